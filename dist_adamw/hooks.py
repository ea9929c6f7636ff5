"""Moved to `dist_adamw.optimizer.gradients.weak_hooks`; pickles of modules that 0.1.0 attached name this path."""

from dist_adamw._moved import forward

__getattr__ = forward(__name__, "dist_adamw.optimizer.gradients.weak_hooks")
