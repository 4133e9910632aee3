"""Checkpoints: written aside, verified before they are loaded."""
