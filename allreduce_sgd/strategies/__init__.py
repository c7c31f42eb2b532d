"""Ways to distribute SGD: one file per family of methods, one interface (`base`)."""
