"""How programs are called, swapped and held."""
