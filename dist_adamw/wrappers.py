"""Unwrap models, optimizers and parameter names from the wrappers of libraries.

Recognises them by attributes and names, so no library needs to be there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def bare(model: nn.Module) -> nn.Module:
    """The module inside wrappers. Local."""
    while True:
        if isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
        else:
            return model


def names_without_wrappers(model: nn.Module) -> Callable[[str], str]:
    """How names in ``model`` are without wrappers, of modules inside it too: compiled, checkpointed, in DDP. Local."""
    # "module" may be the user's own name, so only where DDP put it. The longest first: they are inside the others.
    found = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, (DistributedDataParallel, nn.DataParallel))
    ]
    prefixes = sorted(found, key=len, reverse=True)

    def clean(name: str) -> str:
        name += "."  # so that the wrapped module itself is found
        for prefix in prefixes:
            if name.startswith(f"{prefix}module."):
                name = prefix + name.removeprefix(f"{prefix}module.")
        return without_wrappers(name.removesuffix("."))

    return clean


# Whole components of a name: a module of the user's may be called "a_orig_mod".
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")


def without_wrappers(name: str) -> str:
    """A parameter's or module's name in the model inside what compiles, checkpoints or shards it. Local."""
    return _WRAPPERS.sub("", name).removesuffix(".")


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers that keep theirs in ``.optimizer``; DeepSpeed's are no torch optimizers."""
    inner: Any = optimizer
    while (inner := getattr(inner, "optimizer", None)) is not None:
        if isinstance(inner, Optimizer):
            optimizer = inner
    return optimizer
