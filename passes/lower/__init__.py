"""Regions of adapters as kernels for a GPU."""
