"""Passes that cut a program into stages, which several processes run one after the other."""
