"""Capture models whose vision towers compute from the sizes of their images."""
