"""A run's folder: its files, status and environment."""
