"""Grids of runs and the tables of their results."""
