"""Data sets, their download, and the order in which samples are visited; a leaf that knows no communication."""
