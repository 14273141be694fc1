"""Functions of torch and transformers that are replaced while a model is traced."""
