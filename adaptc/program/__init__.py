"""The program users hold, and what makes another one of it."""
