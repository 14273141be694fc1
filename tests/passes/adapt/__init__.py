"""Adapters into graphs and out of them."""
