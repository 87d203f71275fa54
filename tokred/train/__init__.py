"""Training: the loop, its optimiser and its log."""
