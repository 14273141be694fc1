"""Compute rows of one batch on different adapters: find where rows are, read which adapters they want, make the
code."""
