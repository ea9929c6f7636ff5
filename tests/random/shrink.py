"""Shorter and shorter lists that still fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[list[T]], bool], *, seconds: float = 30.0) -> list[T]:
    """Leave out as many ``items`` as can be while ``fails`` stays true of the rest.

    Args:
        fails: True of ``items``. Takes time, so it is asked as seldom as possible.
        seconds: After these, what has been found by then is returned.
    """
    kept = list(items)
    until = time.monotonic() + seconds
    size = max(len(kept) // 2, 1)
    while True:
        removed = False
        place = max(len(kept) - size, 0)  # from the end: what came last is needed least often
        while True:
            if time.monotonic() > until:
                return kept
            rest = kept[:place] + kept[place + size :]
            if len(rest) < len(kept) and fails(rest):
                kept, removed = rest, True
            if place == 0:
                break
            place = max(place - size, 0)
        if size == 1 and not removed:
            return kept
        size = max(size // 2, 1)
