"""Processes, progress bars and files; nothing here depends on adapters."""
