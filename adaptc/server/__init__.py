"""Serve a model with many adapters over HTTP, by transformers' OpenAI-compatible app."""
