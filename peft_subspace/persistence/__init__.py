"""Adapters on disk and on the Hub."""
