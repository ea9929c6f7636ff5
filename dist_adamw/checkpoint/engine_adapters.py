"""Choose the adapter that reads and writes a model's state, by the model's engine."""

from __future__ import annotations

import importlib
import sys

from torch import nn
from torch.optim import Optimizer

from dist_adamw.checkpoint.local_state import Access
from dist_adamw.checkpoint.torch_state import TorchAccess

# By the library that must be loaded for there to be such a model: a module of ours, whose ``find_access(model,
# optimizer)`` returns None where the model is not that engine's. Named as text, so that none is imported in vain.
_ENGINES = {"deepspeed": "dist_adamw.integrations.deepspeed.zero_state"}


def access(model: nn.Module, optimizer: Optimizer | None) -> Access:
    """Return how to reach the state of ``model``. Local."""
    for library, module in _ENGINES.items():
        if library in sys.modules:
            found: Access | None = importlib.import_module(module).find_access(model, optimizer)
            if found is not None:
                return found
    return TorchAccess(model, optimizer)
