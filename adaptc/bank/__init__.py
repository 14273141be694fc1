"""Run rows of one batch on different adapters."""
