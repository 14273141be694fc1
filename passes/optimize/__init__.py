"""Passes that compute the same values with fewer operators; they make the graphs that calls of a program run."""
