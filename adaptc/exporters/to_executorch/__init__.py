"""ExecuTorch programs with adapters as inputs, adapters for them, and sessions that choose one in each call."""
