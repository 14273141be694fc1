"""PEFT adapter directories as bytes and keys; no graph, no model."""
