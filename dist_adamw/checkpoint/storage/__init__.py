"""Tensor files for torch.distributed.checkpoint. Reading them executes no code."""
