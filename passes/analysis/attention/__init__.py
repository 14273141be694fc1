"""Find attentions in a graph, and what their queries, keys and values are computed from."""
