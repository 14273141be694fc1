"""Compute the tensors of an adapter from those of others."""
