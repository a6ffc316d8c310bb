"""The methods, a folder each: `config.py`, `delta.py`, and mathematics of their own."""
