"""Weights and target files: reading them, and exporting weights for other libraries."""
