"""Initialization of adapters from data, by passes that leave the model and the data loader as they were."""
