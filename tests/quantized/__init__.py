"""Weights stored in few bits, and programs that read them."""
