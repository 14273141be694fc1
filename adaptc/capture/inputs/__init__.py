"""Make the inputs with which a model is captured and checked."""
