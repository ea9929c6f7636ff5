"""Validate a saved schedule before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dist_adamw.schedule.batch import check_positive_int, shown

OnDifference = Literal["strict", "checkpoint", "new"]
STATE_VERSION = 1
GROUPS = "groups (lr, min_lr, weight_decay)"  # the key of the base values in a configuration
BATCHES = "batch_size_schedule"  # the key of a batch-size schedule; None: one batch, which a job may change
# Options that 0.1.0 did not have. A configuration has them only if they are not these defaults, since the keys of
# configurations must be the same.
LATER_OPTIONS: dict[str, Any] = {
    "decay_length": None,
    "decay_shape": "linear",
    "rewarmup": None,
    "peak_factor": 1.0,
    "cycle_ends": None,
    "total_samples": None,
    "fit": "last",
    "weight_decay_timescale": None,
    "weight_decay_norm": "paper",
    "tokens_per_sample": None,
    BATCHES: None,
}
_FUNCTIONS = ("policy_fn", "eta_on_restart_cb", "eta_on_iteration_cb")


def check_on_difference(choice: object) -> None:
    """Raise ValueError unless ``choice`` is an `OnDifference`."""
    if choice not in ("strict", "checkpoint", "new"):
        raise ValueError(f"on_difference must be 'strict', 'checkpoint' or 'new', got {choice!r}.")


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``state_dict``, which may come from an untrusted file, is the state of a schedule."""
    needed = {"samples", "batch_size", "reference_batch_size", "configuration"}
    if state_dict.get("version") != STATE_VERSION or not needed <= state_dict.keys():
        raise ValueError(
            f"not a state of CyclicLRWithRestarts version {STATE_VERSION}: its keys are {sorted(state_dict)}."
        )
    samples = state_dict["samples"]
    if type(samples) is not int or not 0 <= samples < 1 << 62:
        raise ValueError(f"samples of a saved schedule must be a whole number from 0 to 2**62, got {samples!r}.")
    for name in ("batch_size", "reference_batch_size"):
        if state_dict[name] is not None:
            check_positive_int(f"{name} of a saved schedule", state_dict[name])
    configuration = state_dict["configuration"]
    if not isinstance(configuration, Mapping):
        raise ValueError(f"configuration of a saved schedule must be a dict, got {configuration!r}.")
    if configuration.get("epoch_size") is not None:
        check_positive_int("epoch_size of a saved schedule", configuration["epoch_size"])


def compare_configurations(
    saved: Mapping[str, Any], ours: Mapping[str, Any], choice: OnDifference
) -> tuple[dict[str, Any], list[str]]:
    """Compare a saved configuration with ``ours``.

    Returns:
        The saved configuration with all options, and an epoch size if either side knows it; and the keys that differ.

    Raises:
        ValueError: the keys are not the same, or values differ and ``choice`` is "strict".
    """
    saved, ours = {**LATER_OPTIONS, **saved}, {**LATER_OPTIONS, **ours}
    if odd := sorted(map(str, saved.keys() ^ ours.keys())):
        raise ValueError(
            f"the configuration of a saved schedule must have the keys {', '.join(sorted(ours))}; missing or "
            f"unknown: {shown(odd)}. The state was edited, or is from another version of dist_adamw."
        )
    # An epoch size that one side does not know yet is not a difference.
    saved = {**saved, "epoch_size": saved["epoch_size"] or ours["epoch_size"]}
    ours = {**ours, "epoch_size": ours["epoch_size"] or saved["epoch_size"]}
    differing = [key for key in sorted(ours) if saved[key] != ours[key]]
    if differing and choice == "strict":
        lines = "; ".join(f"{key} was {saved[key]!r} and is {ours[key]!r}" for key in differing)
        raise ValueError(
            f"the checkpoint has a different schedule: {lines}. Pass the same arguments, or choose with "
            "CyclicLRWithRestarts(on_difference='checkpoint') or 'new'."
        )
    return saved, differing


def check_takeable(saved: Mapping[str, Any], differing: list[str], group_count: int) -> None:
    """Raise ValueError if a saved configuration cannot replace this job's.

    Args:
        saved: The configuration.
        differing: The keys that differ.
        group_count: The number of the optimizer's parameter groups.
    """
    functions = [key for key in differing if key in _FUNCTIONS and saved[key] is not None]
    if functions:
        raise ValueError(
            f"the checkpoint used {functions[0]}={saved[functions[0]]!r}; a function cannot be loaded from a "
            "checkpoint. Pass it to CyclicLRWithRestarts."
        )
    if len(saved[GROUPS]) != group_count:
        raise ValueError(f"the checkpoint has {len(saved[GROUPS])} parameter groups, this optimizer {group_count}.")
