"""Capture any model as an exported program, with facts of the model that its graph does not hold."""
