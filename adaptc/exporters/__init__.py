"""Programs for other runtimes, with adapters as inputs that each call gives."""
