"""Training with the packages that people train with."""
