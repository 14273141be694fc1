"""Trains every method on two small tasks and compares them: ``python -m tests.comparison``, or ``make compare``."""
