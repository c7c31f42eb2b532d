"""Models and losses; a leaf that knows no communication."""
