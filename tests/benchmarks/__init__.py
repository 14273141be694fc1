"""Benchmarks, run by ``make bench``: never part of the test suite, and no assertion on a time."""
