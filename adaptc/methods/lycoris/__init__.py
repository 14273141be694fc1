"""Methods of LyCORIS: products of Hadamard and Kronecker."""
