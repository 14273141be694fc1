"""Requests of several adapters under continuous batching, next to what serves them otherwise."""
