"""Layers that other libraries quantised, read as weights of ours: one file per library, and what puts them in place."""
