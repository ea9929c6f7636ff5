"""Tensors in files, for torch.distributed.checkpoint. Nothing is executed when they are read."""
