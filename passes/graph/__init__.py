"""Read and edit exported graphs: the foundation of all passes."""
