"""Methods that rotate a weight."""
