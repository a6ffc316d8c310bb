"""Autograd functions for layers with an updated weight."""
