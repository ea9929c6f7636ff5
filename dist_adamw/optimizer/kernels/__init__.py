"""AdamW kernels, one module per implementation.

Imports torch only, and Triton when a kernel is first launched. `mixed` is the arithmetic
in plain torch, for any device; `triton` is one launch per bucket on a GPU. Nothing here
knows of ranks, parameter groups or checkpoints.
"""
