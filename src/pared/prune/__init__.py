"""Pruning: which channels matter least, how many may stay, and how they leave a model exactly."""
