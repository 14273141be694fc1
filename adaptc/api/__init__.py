"""Define the functions that the facade exports.

All leave their inputs as they were, with two exceptions. The only effect of ``swap`` is the new current binding. After
``merge(..., keep_base=False)`` the program must not be used. A call that raises changed nothing.
"""
