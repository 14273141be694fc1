"""Read and write PEFT adapter directories as bytes and keys, without a graph or a model."""
