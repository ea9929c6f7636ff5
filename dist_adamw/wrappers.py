"""Unwrap models, optimizers and parameter names from the wrappers of libraries.

Wrappers are recognised by attributes and names, so none of these libraries has to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside DDP and ``torch.compile``. Local."""
    while True:
        if isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
        else:
            return model


def names_without_wrappers(model: nn.Module) -> Callable[[str], str]:
    """Return a function that removes wrappers' components from names in ``model``, inner modules' included. Local."""
    # A user may call a module "module", so strip it only where DDP put it. The longest prefixes are the innermost.
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


# Match whole components of a name only: a user's module may be called "a_orig_mod".
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")


def without_wrappers(name: str) -> str:
    """Remove the components that compiling, activation checkpointing and FSDP1 add to a name. Local."""
    return _WRAPPERS.sub("", name).removesuffix(".")


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Return the innermost torch optimizer, following ``.optimizer``. DeepSpeed's wrappers are not torch optimizers."""
    inner: Any = optimizer
    while (inner := getattr(inner, "optimizer", None)) is not None:
        if isinstance(inner, Optimizer):
            optimizer = inner
    return optimizer
