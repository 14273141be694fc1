"""Adapter methods, one file each: a config, the slots, their init, and what the method means as a function."""
