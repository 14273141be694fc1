"""Weights stored in few bits: the schemes, their dequantisation in plain torch, and the layers that read them."""
