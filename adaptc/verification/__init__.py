"""Verify on random inputs what adaptc promises of programs, packages and methods."""
