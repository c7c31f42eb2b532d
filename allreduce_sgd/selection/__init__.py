"""Which model a run ends with: when to stop, and averages of the models on the way."""
