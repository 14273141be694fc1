"""Train for several clients, or several configs, at once: adapters of one base that share batches."""
