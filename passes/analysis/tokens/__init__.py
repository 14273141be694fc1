"""Find which axes and inputs of a graph have tokens or rows."""
