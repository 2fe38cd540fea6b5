"""Weights that are divided among ranks."""
