"""Adapter directories as files."""
