"""What `vanishing compress` does: read a model and data, train with transformers' Trainer, evaluate, report."""
