"""The optional objects of a method: its files, sizes, per-row form, kernels, shared slots and extra inputs."""
