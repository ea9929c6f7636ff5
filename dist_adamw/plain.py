"""Configuration as plain data, which a safe load accepts and which compares by value.

Floor 0: knows nothing of what is configured.
"""

from __future__ import annotations

import re
from numbers import Integral, Number, Rational, Real
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """``value`` as data that a safe load accepts and that compares by value."""
    if value is None or isinstance(value, bool | str):
        return value
    # numpy's numbers too, which a safe load would refuse.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Number):
        return str(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
