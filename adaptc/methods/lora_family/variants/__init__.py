"""Variants of LoRA that a field of its config chooses."""
