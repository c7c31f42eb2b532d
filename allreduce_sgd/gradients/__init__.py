"""The gradient engine: buckets of gradients, reduced while back-propagation is still running."""
