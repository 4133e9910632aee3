"""Classifiers trained and scored on labels."""
