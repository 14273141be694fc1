"""Examines which families of transformers adaptc captures: ``python -m tests.coverage`` writes ``coverage.md``."""
