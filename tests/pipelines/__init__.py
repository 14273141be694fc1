"""Rows of one batch on different adapters."""
