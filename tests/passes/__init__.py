"""Tests of passes/, by the same packages."""
