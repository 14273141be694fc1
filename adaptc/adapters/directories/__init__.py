"""Models in directories of safetensors files, which are read and written one tensor at a time."""
