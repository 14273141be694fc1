"""Generation: a causal model as one step program with its cache among its inputs, driven by transformers' generate."""
