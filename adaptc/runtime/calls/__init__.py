"""Check and flatten the inputs of a call, replay it as a CUDA graph, and give its outputs the form of the model's."""
