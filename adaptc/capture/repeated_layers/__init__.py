"""Trace equal layers of a model once."""
