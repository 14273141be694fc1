"""Put adapters into a program and take them out of it: inject, respecialize, merge, unload."""
