"""Adapters outside of any program: as objects, combined with one another, and made of changed weights."""
