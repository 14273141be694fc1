"""Models as exported programs."""
