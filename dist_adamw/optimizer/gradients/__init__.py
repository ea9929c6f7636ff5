"""Local gradients on their way to the ranks that own them."""
