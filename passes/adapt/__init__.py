"""Adapters into a program and out of it: inject, respecialize, merge, unload."""
