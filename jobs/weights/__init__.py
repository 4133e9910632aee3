"""Weights and target files, read from wherever they are."""
