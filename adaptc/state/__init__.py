"""Hold a program with its adapters, and make other programs of it: merged, unloaded, bound."""
