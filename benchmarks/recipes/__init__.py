"""The course's experiments as recipes: what to expect and why, real trainings, and whether it was seen."""
