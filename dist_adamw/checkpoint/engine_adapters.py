"""Choose the adapter that reads and writes a model's state, by the engine."""

from __future__ import annotations

import importlib
import sys

from torch import nn
from torch.optim import Optimizer

from dist_adamw.checkpoint.local_state import Access
from dist_adamw.checkpoint.torch_state import TorchAccess

# By library: the module whose ``find_access(model, optimizer)`` returns None unless the model is that engine's. Names,
# so that nothing is imported for an engine whose library the process has not loaded: it can have no such model.
_ENGINES = {"deepspeed": "dist_adamw.integrations.deepspeed.zero_state"}


def access(model: nn.Module, optimizer: Optimizer | None) -> Access:
    """Return the adapter for the state of ``model``. Local."""
    for library, module in _ENGINES.items():
        if library in sys.modules:
            found: Access | None = importlib.import_module(module).find_access(model, optimizer)
            if found is not None:
                return found
    return TorchAccess(model, optimizer)
