"""Lifted programs, regions, traces, and what every pass is held to."""
