"""Kinds of layers, and what an update does in place of each."""
