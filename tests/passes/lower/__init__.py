"""Regions as kernels."""
