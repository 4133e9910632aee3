"""Ranks: launching them, their process group, their health, and how they end."""
