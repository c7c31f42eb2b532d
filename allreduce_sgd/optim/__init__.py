"""Optimizers by their torch.optim names, and learning-rate schedules."""
