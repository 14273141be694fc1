"""Programs compiled ahead of time with AOTInductor, whose adapters can still be swapped."""
