"""Ranks, their process group, and what ends them."""
