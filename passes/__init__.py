"""Graph in, graph out: the passes over exported programs, one per file.

Imported as ``adaptc.passes``. A pass takes a valid program, states what it changes, and leaves a valid program.
"""
