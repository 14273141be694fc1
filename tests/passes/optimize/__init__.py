"""Passes that change no value: canonical graphs, fused siblings, hoisted work."""
