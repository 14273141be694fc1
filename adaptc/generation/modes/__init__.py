"""Capture one generation step for each cache mode: static, recurrent, uncached, and how prompts are fed to it."""
