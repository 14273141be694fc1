"""Programs as files: what strangers may put in them, and what their reader makes of it."""
