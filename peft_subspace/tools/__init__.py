"""Tools for people: cost estimates, inspection of adapters, pictures."""
