"""Adapters on disk and on the Hub: loading, model cards, upload, export to LoRA."""
