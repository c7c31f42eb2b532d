"""Sweeps over hyper-parameters: many trainings at once, each on its share of the ranks."""
