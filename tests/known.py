"""Narrow types where a test knows more than the object's type says."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_adamw import DistAdamW, wrappers

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def unwrap(optimizer: Any) -> DistAdamW:
    """Our optimizer, inside whatever wraps it."""
    inner = wrappers.unwrap(optimizer)
    assert isinstance(inner, DistAdamW)
    return inner


def grad_of(param: Tensor) -> Tensor:
    """A gradient that is there."""
    assert param.grad is not None
    return param.grad


def to_memory_format(model: ModuleT, memory_format: torch.memory_format) -> ModuleT:
    """Put the weights of four dimensions in another order of memory."""
    to: Any = model.to  # torch's types lack memory_format
    to(memory_format=memory_format)
    return model
