"""One rank's share of the optimizer state."""
