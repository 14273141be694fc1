"""Initialise KV prefixes from texts and from ``past_key_values``."""
