"""Requests with adapters of their own under transformers' continuous batching."""
