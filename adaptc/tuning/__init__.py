"""Choose between ways to compute a matmul on this CPU, from times measured once."""
