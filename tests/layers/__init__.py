"""Kinds of layers, through whole programs: every way to read a weight."""
