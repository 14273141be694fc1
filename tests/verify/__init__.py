"""Verification, and that it can fail."""
