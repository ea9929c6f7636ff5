"""Redirect module paths of 0.1.0 to their new modules."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def forward(old: str, new: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that has moved from ``old`` to ``new``."""

    def __getattr__(name: str) -> Any:  # noqa: N807
        value = getattr(importlib.import_module(new), name)
        if not name.startswith("__"):
            warnings.warn(f"{old}.{name} has moved: import it from {new}.", DeprecationWarning, stacklevel=2)
        return value

    return __getattr__
