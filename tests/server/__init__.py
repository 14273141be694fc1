"""The OpenAI-compatible server of a model with many adapters."""
