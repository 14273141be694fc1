"""Modes, and steps of training modules."""
