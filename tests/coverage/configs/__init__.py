"""Makes small configs of all families."""
