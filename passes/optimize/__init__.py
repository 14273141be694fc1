"""The same values from fewer operators: what calls of a program run is made by these."""
