"""First values of adapters that are made of data: run the base on batches, and look at what its sites read."""
