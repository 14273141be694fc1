"""What was adapted, swapped, merged: numbers that print as tables."""
