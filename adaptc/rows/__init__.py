"""Rows of one batch on different adapters: where rows are, which adapters they want, and the code that computes it."""
