"""Compute the KV prefix that an adapter puts into a cache, for one row or for rows with different adapters."""
