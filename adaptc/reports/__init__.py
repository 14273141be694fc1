"""Report what was adapted, swapped and merged: numbers that print as tables."""
