"""Convert configuration to plain data, which a safe load accepts and which compares by value."""

from __future__ import annotations

import re
from numbers import Integral, Number, Rational, Real
from types import MappingProxyType
from typing import Any

from torch import Tensor

# Checkpoints name functions by their module in 0.1.0, and configurations are compared as text, so the names must stay.
_MODULE_IN_CHECKPOINTS = {
    "dist_adamw.schedule.exact_math": "dist_adamw.exact_math",
    "dist_adamw.schedule.policies": "dist_adamw.policies",
    "dist_adamw.schedule.restarts": "dist_adamw.schedule",
}


def plain(value: Any) -> Any:
    """Return ``value`` as data that a safe load accepts and that compares by value."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Number):
        return _plain_number(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, MappingProxyType):
        return repr(dict(value))
    if isinstance(value, Tensor):
        return value.tolist()
    if hasattr(value, "__qualname__"):
        module = _MODULE_IN_CHECKPOINTS.get(value.__module__, value.__module__)
        return f"{module}.{value.__qualname__}"
    # An address would differ between processes, so equal configurations would not compare equal.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _plain_number(value: Number) -> int | float | str:
    # Convert numpy's numbers too: a safe load would refuse them.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        return float(value)
    return str(value)
