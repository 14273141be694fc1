"""Adapt whole pipelines of diffusers: denoisers and text encoders run as programs, behind the pipeline's own verbs."""
