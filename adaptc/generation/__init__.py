"""Generate text with a causal model as one step program that takes its cache, driven by transformers' ``generate``."""
