"""Processes, progress bars and files: what knows nothing of adapters."""
