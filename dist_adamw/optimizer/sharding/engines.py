"""Detect engines that shard an optimizer's state themselves."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch.optim import Optimizer


def engine_that_shards(optimizer: Optimizer) -> Any:
    """The optimizer of DeepSpeed that steps ``optimizer`` on its own partitions; None without one. Local.

    DeepSpeed puts its flat fp32 partitions into the groups of the optimizer that it is given, and says so nowhere but
    by keeping it. So its own objects are looked through, which takes tenths of a second: ask rarely.
    """
    module = sys.modules.get("deepspeed.runtime.base_optimizer")
    base = getattr(module, "DeepSpeedOptimizer", None)
    if base is None:
        return None
    found = (candidate for candidate in gc.get_objects() if issubclass(type(candidate), base))
    return next((one for one in found if getattr(one, "optimizer", None) is optimizer), None)
