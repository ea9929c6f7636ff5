"""AdamW with its state sharded over ranks."""

from dist_adamw.optimizer.adamw import DistAdamW

__all__ = ["DistAdamW"]
