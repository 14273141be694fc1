"""Define the protocol of adapter methods, and the parts of a graph that an adapter owns."""
