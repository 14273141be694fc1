"""Compile programs ahead of time with AOTInductor, and run them with adapters that can still be swapped."""
