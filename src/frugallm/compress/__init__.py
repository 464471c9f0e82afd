"""Make a model cheaper after training."""
