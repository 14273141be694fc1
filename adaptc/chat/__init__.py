"""Chat at a prompt with a model that answers line by line, and swap its adapters meanwhile."""
