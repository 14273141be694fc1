"""Check and flatten the inputs of a call, and give its outputs the form of the model's outputs."""
