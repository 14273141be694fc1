"""Models with layers that other libraries quantised."""
