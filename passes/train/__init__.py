"""Passes for the module that trains: its mode, autocast, checkpointing, and steps with backwards of their own."""
