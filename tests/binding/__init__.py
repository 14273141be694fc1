"""Adapters as tensors for the slots of a program."""
