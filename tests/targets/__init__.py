"""Which sites a config means."""
