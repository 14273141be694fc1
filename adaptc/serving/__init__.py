"""Serve requests of many adapters in one step, under transformers' continuous batching."""
