"""Studies of the time to an accuracy: a grid of trainings from a TOML file, all cells tuned alike, run with seeds."""
