"""Starts of adapters from data, and passes over data that leave no trace."""
