"""Choose the parameters that do not decay."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dist_adamw.schedule.batch import shown
from dist_adamw.wrappers import names_without_wrappers

NoDecay = Literal["norms_and_biases", "one_dimensional", "none"] | list[str] | None
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, _NormBase)
# transformers' Trainer.get_decay_parameter_names: also norms of models that write their own.
_NORM_OR_BIAS = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def names_without_decay(model: nn.Module, no_decay: NoDecay) -> set[str]:
    """Return the names, as in ``model.named_parameters()``, of the parameters that do not decay. Local.

    Args:
        model: The model; its names are compared without the components that DDP, FSDP1 and ``torch.compile`` add.
        no_decay: The rule: see the recipe's ``no_decay``.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    clean = names_without_wrappers(model)
    if isinstance(no_decay, list):
        return _matching({name: clean(name) for name, _ in model.named_parameters()}, no_decay)
    if no_decay == "one_dimensional":
        return {name for name, param in model.named_parameters() if param.ndim < 2}
    if no_decay == "norms_and_biases":
        of_norms = {id(p) for one in model.modules() if isinstance(one, _NORMS) for p in one.parameters(recurse=False)}
        return {
            name
            for name, param in model.named_parameters()
            if id(param) in of_norms or _NORM_OR_BIAS.search(clean(name).lower())
        }
    return set()


def _matching(names: dict[str, str], patterns: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name, clean in names.items() if fnmatch.fnmatchcase(clean, pattern)}
        if not matching:
            some = ", ".join([*names.values()][:3])
            raise ValueError(
                f"no_decay: no parameter's name matches the pattern {pattern!r}. Names are {some}, and so on; * stands "
                "for any text."
            )
        found |= matching
    return found


def parameter_groups(model: Any, no_decay: NoDecay) -> Any:
    """Return ``params`` for an optimizer: decayed parameters first, then the others with a weight decay of 0. Local.

    Args:
        model: A module; or parameters or groups as for any torch optimizer, which only ``"none"`` leaves as they are.
        no_decay: See `names_without_decay`.

    Raises:
        ValueError: ``model`` is no module and ``no_decay`` needs one; or a pattern matches nothing.
    """
    if no_decay in (None, "none"):
        return list(model.parameters()) if isinstance(model, nn.Module) else model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"no_decay={shown(no_decay)} chooses parameters of a model, got a {type(model).__name__}. Pass the model; "
            "or leave no_decay out, and pass groups with weight_decay=0.0."
        )
    without = names_without_decay(model, no_decay)
    decayed = [param for name, param in model.named_parameters() if name not in without]
    others = [param for name, param in model.named_parameters() if name in without]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
