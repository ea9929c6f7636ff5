"""Reduce gradients to the ranks that own them."""
