"""Capture, check and cache the steps of encoder-decoder models. The generator is in ``encoder_decoder``."""
