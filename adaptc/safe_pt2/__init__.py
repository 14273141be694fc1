"""Read exported programs (``.pt2``) from strangers, from the bytes of the archive up to a program that torch may build.

A ``.pt2`` file can name a pickle, an expression that is evaluated, a module that is imported, and text that becomes
Python source. So torch never opens the file here. It is opened once, every record is checked, and the weights are read
into memory of their own. torch then gets values that can only become a graph of known operators.
"""
