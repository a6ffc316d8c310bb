"""The glue to PEFT: config, targets, tuner layer and tuner model."""
