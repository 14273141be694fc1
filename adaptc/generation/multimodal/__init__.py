"""Generate from prompts that hold images or audio beside text."""
