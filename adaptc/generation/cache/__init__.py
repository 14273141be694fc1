"""Hold what a generation step reads and writes: keys and values, positions, masks and activation masks."""
