"""Methods whose change of a weight depends on the weight."""
