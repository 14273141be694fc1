"""Insert virtual tokens and KV prefixes into a graph."""
