"""Triton kernels, one family per file: jit kernels, launcher, op with a fake, and a torch reference.

Imported as ``adaptc.kernels``. Importing this package does not import triton; the modules inside it do.
"""
