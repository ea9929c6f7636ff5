"""Slices of flat tensors between ranks: gradients to their owners, parameters to all."""
