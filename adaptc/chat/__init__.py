"""A chat at a prompt: a model that answers line by line, and adapters that are swapped while it goes on."""
