"""A log of what a run has trained on and what its weights were, and the first difference between two such logs."""
