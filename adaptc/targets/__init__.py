"""Choose the sites of a program that a config adapts, and the method at each of them."""
