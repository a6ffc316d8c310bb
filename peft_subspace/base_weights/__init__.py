"""Frozen weights: reading them, writing them, putting them back bit for bit, recognizing them again."""
