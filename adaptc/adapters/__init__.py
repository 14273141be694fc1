"""Handle adapters outside of any program: as objects, combined with one another, and made from changed weights."""
