"""Save a program without the weights of its base, and complete it from the base when it is loaded.

``base_table`` says which weights the base must have; ``given_base`` reads them from what a user gives.
"""
