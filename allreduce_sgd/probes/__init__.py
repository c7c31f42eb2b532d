"""What is tried before training, or in its place: whether gradients are right, and which learning rates can serve."""
