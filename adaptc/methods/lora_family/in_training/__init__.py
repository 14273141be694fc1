"""Variants of LoRA that differ from it in training alone: in inference and in a merged weight they are LoRA."""
