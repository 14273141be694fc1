"""Lower adapter regions to GPU kernels, and choose the matmuls of base layers on a CPU."""
