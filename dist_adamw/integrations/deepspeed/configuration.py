"""Check and complete a DeepSpeed configuration, and register the types that it may name."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

Config = MutableMapping[str, Any]
T = TypeVar("T")
CLIPPING = "gradient_clipping"
_SCHEDULER = "CyclicLRWithRestarts"
# Arguments that JSON cannot express or that the engine provides, with the advice for the error.
NOT_FOR_JSON = {
    "params": "DeepSpeed passes the parameters",
    "optimizer": "DeepSpeed passes the optimizer",
    "mesh": "DeepSpeed shards state itself",
    "master_dtype": "DeepSpeed keeps fp32 weights itself, so leave it out",
    "state_dtype": "DeepSpeed keeps state in fp32, so leave it out",
    "reduce_dtype": 'write "communication_data_type" next to "optimizer"',
    "reproducible": "DeepSpeed adds gradients up itself, so leave it out",
    "max_grad_norm": 'write "gradient_clipping" next to "optimizer"',
    "policy_fn": "a function is built in code: pass the scheduler to deepspeed.initialize or to prepare",
    "eta_on_restart_cb": "a function is built in code: pass the scheduler to deepspeed.initialize or to prepare",
    "eta_on_iteration_cb": "a function is built in code: pass the scheduler to deepspeed.initialize or to prepare",
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_FILLED_BY_PREPARE = ("batch_size", "epoch_size")
_OWN_AUTO = ("shard", "normalize_weight_decay")  # for these, "auto" is a value of this package


def accumulation_of(config: Config, accumulation: int) -> int:
    """Return the micro-batches of an update: the configuration's number, unless that is "auto". Local."""
    given = config.get("gradient_accumulation_steps", "auto")
    return accumulation if given == "auto" else int(given)


def batch_sizes_of(config: Config) -> Any:
    """Return the ``batch_size`` of the configuration's scheduler; None if it has none. Local."""
    section = config.get("scheduler", {})
    return section.get("params", {}).get("batch_size") if section.get("type") == _SCHEDULER else None


def set_accumulation(engine: Any, steps: int) -> None:
    """Make a DeepSpeed engine accumulate ``steps`` micro-batches, from its next update on. Local."""
    engine.set_train_batch_size(steps * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)


def configure(config: Config, optimizer: Optimizer | None) -> None:
    """Make the engine clip as ``optimizer`` would, and keep ``optimizer``. Local; before the engine is built.

    Args:
        config: The DeepSpeed configuration; changed in place.
        optimizer: Its ``max_grad_norm`` moves to the configuration. None: it is made later, without one.

    Raises:
        ValueError: both have a norm and they differ; or the configuration asks for another optimizer.
    """
    given = config.get(CLIPPING, "auto")
    norm = optimizer.max_grad_norm if isinstance(optimizer, DistAdamW) else None
    if norm is not None and given not in ("auto", norm):
        raise ValueError(
            f"max_grad_norm={norm} was given to DistAdamW and gradient_clipping={given} to DeepSpeed, which clips. "
            "Set only one of them, or the same norm."
        )
    if given == "auto":
        # Without a value DeepSpeed 0.19 clips to 1.0, and Accelerate resolves "auto" to 1.0.
        config[CLIPPING] = norm or 0.0
    if isinstance(optimizer, DistAdamW):
        optimizer.max_grad_norm = None
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    # Without this key Accelerate replaces a client optimizer by DeepSpeedCPUAdam, with L2 decay.
    if offload != "none" and config.setdefault("zero_force_ds_cpu_optimizer", False):
        raise ValueError(
            f'"zero_force_ds_cpu_optimizer": true asks for DeepSpeedCPUAdam in place of {type(optimizer).__name__}, '
            "which computes something else. Leave it out."
        )


def register_deepspeed() -> None:
    """Register ``"type": "DistAdamW"`` and ``"type": "CyclicLRWithRestarts"`` for DeepSpeed JSON files. Local.

    Call it once, before ``deepspeed.initialize`` or ``accelerator.prepare``; `dist_adamw.prepare` calls it itself. The
    "params" of both are the classes' arguments by name. `dist_adamw.prepare` resolves ``"auto"`` for ``batch_size`` and
    ``epoch_size``; Accelerate or transformers resolve it for ``lr`` and ``weight_decay``.

    On a machine without an accelerator it also replaces DeepSpeed's shared-memory collectives by gloo's: those are
    compiled when the process group is created, and a killed build leaves a lock on which every later start waits
    forever. So call it before ``Accelerator()`` there.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    try:
        import deepspeed
        from deepspeed.runtime import lr_schedules
        from deepspeed.runtime.zero import utils as zero
    except ImportError as error:
        raise ImportError("register_deepspeed() needs DeepSpeed: pip install 'dist_adamw[deepspeed]'.") from error
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed has no registry: it looks names up in these modules.
    torch.optim.DistAdamW = _optimizer_from_json  # type: ignore[attr-defined]
    lr_schedules.CyclicLRWithRestarts = _scheduler_from_json
    if DistAdamW not in zero.ZERO_SUPPORTED_OPTIMIZERS:
        zero.ZERO_SUPPORTED_OPTIMIZERS.append(DistAdamW)
    if _SCHEDULER not in lr_schedules.VALID_LR_SCHEDULES:
        lr_schedules.VALID_LR_SCHEDULES.append(_SCHEDULER)


def names_our_types(config: Mapping[str, Any]) -> bool:
    """Return whether a DeepSpeed configuration names an optimizer or scheduler of this package. Local."""
    return any(config.get(part, {}).get("type") in ("DistAdamW", _SCHEDULER) for part in ("optimizer", "scheduler"))


def fill(config: Config, batch_size: int, epoch_size: int | None) -> bool:
    """Resolve ``"auto"`` from loader and accelerator; return whether both numbers match theirs. Local."""
    section = config.get("scheduler", {})
    if section.get("type") != _SCHEDULER:
        return False
    given = section.setdefault("params", {})
    known = dict(zip(_FILLED_BY_PREPARE, (batch_size, epoch_size), strict=True))
    for name, value in known.items():
        if given.get(name, "auto") == "auto" and value is not None:
            given[name] = value
    return all(given.get(name) == value for name, value in known.items())


def problem_of(config: Mapping[str, Any], section: Literal["optimizer", "scheduler"]) -> str | None:
    """Return what is wrong with the arguments of a type of this package in a configuration; None if nothing is. Local.

    Args:
        config: The DeepSpeed configuration; "auto" counts as right.
        section: Which of the two; one of another type counts as right.
    """
    types = {"optimizer": "DistAdamW", "scheduler": _SCHEDULER}
    given = {
        name: {k: v for k, v in config[name].get("params", {}).items() if v != "auto" or k in _OWN_AUTO}
        for name in ("optimizer", "scheduler")
        if config.get(name, {}).get("type") == types[name]
    }
    optimizer = DistAdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        if "optimizer" in given:
            optimizer = _optimizer_from_json([torch.nn.Parameter(torch.zeros(1))], **given["optimizer"])
    except ValueError as error:
        if section == "optimizer":
            return str(error)
    try:
        if section == "scheduler" and section in given:
            _scheduler_from_json(optimizer, **given["scheduler"])
    except ValueError as error:
        return str(error)
    return None


def _optimizer_from_json(params: Iterable[Tensor], /, **given: Any) -> DistAdamW:
    return _made(DistAdamW, "optimizer", params, given)


def _scheduler_from_json(optimizer: Any, /, **given: Any) -> CyclicLRWithRestarts:
    given = {k: v for k, v in given.items() if not (k in _FILLED_BY_PREPARE and v == "auto")}
    scheduler = _made(CyclicLRWithRestarts, "scheduler", optimizer, given)
    if scheduler._scheduled.recipe.batch_schedule is not None:
        scheduler.sample_source = _OneAccumulation(scheduler)
    return scheduler


class _OneAccumulation:
    """Stands for the samples of updates until `prepare` counts them: the engine alone has one accumulation.

    It counts micro-batches from the beginning of training, so changing it in mid-run would move its updates.

    Args:
        scheduler: Has a batch-size schedule; held weakly.
    """

    def __init__(self, scheduler: CyclicLRWithRestarts) -> None:
        self._scheduler = weakref.ref(scheduler)

    def before_update(self, *, has_closure: bool) -> None:
        """Raise ValueError: an update would have the wrong batch."""
        scheduler = self._scheduler()
        batches = "" if scheduler is None else f" ({scheduler._scheduled.recipe.batches})"
        raise ValueError(
            f"batch_size in the DeepSpeed configuration is a schedule{batches}, and deepspeed.initialize alone has one "
            "accumulation for all of training. Use Accelerate's loop with dist_adamw.prepare, or a number."
        )

    def returned_unapplied(self) -> None:
        """Do nothing."""

    def __call__(self) -> Callable[[], int | None]:
        """Count nothing."""
        return lambda: None


def _made(kind: Callable[..., T], section: str, first: Any, given: Mapping[str, Any]) -> T:
    """Return ``kind(first, **given)``, where ``given`` is plain data from a file. Names in it are not imported.

    Raises:
        ValueError: names the section, the key and the problem.
    """
    types = get_type_hints(kind.__init__)
    known = [name for name in types if name not in NOT_FOR_JSON and name != "return"]
    values = {}
    for name, value in given.items():
        _check_name(section, name, value, known)
        if value == "auto" and name not in _OWN_AUTO:
            _refuse(section, name, value, "it was never resolved; set a value")
        kinds = _kinds(types[name])
        readings = _readings(value, kinds)
        if not readings:
            _refuse(section, name, value, f"it must be {' or '.join(filter(None, map(_in_words, kinds)))}")
        values[name] = readings[0]
    try:
        return kind(first, **values)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"DeepSpeed configuration, {section}.params = {dict(given)}: {error}") from error


def _check_name(section: str, name: str, value: object, known: list[str]) -> None:
    """Raise if a key is not in ``known``."""
    if name in NOT_FOR_JSON:
        _refuse(section, name, value, NOT_FOR_JSON[name])
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}."
        raise ValueError(f"DeepSpeed configuration, {section}.params: there is no {name!r}; {advice}")


def _refuse(section: str, name: str, value: object, why: str) -> NoReturn:
    raise ValueError(f"DeepSpeed configuration, {section}.params: {name}={value!r} is wrong: {why}.")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself if it is not one."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _readings(value: Any, kinds: tuple[Any, ...]) -> list[Any]:
    return [*itertools.chain.from_iterable(_read(value, one) for one in kinds)]


def _read(value: Any, kind: Any) -> Iterator[Any]:
    """Yield plain data as ``kind``; nothing if it is not of that kind."""
    if get_origin(kind) is Literal:
        yield from (member for member in get_args(kind) if member == value)
    elif get_origin(kind) is tuple:
        yield from _read_tuple(value, get_args(kind))
    elif get_origin(kind) is Sequence:
        yield from _read_list(value, _kinds(*get_args(kind)))
    elif get_origin(kind) is Mapping:
        yield from _read_mapping(value, _kinds(get_args(kind)[1]))
    elif kind is Any:
        yield value
    elif kind in (int, float) and _may_be_number(value, kind):
        with contextlib.suppress(ValueError, OverflowError):
            yield kind(value)
    elif type(value) is kind and kind in _WORDS:
        yield value


def _may_be_number(value: Any, kind: type) -> bool:
    """Return whether to try ``kind(value)``. YAML reads 1e-3 as text."""
    return isinstance(value, str) or (kind is float and type(value) is int)


def _read_tuple(value: Any, members: tuple[Any, ...]) -> Iterator[Any]:
    if not isinstance(value, list | tuple) or len(value) != len(members):
        return
    readings = [list(_read(one, member)) for one, member in zip(value, members, strict=True)]
    if all(readings):
        yield tuple(one for (one,) in readings)


def _read_list(value: Any, kinds: tuple[Any, ...]) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        readings = [_readings(one, kinds) for one in value]
        if all(readings):
            yield [one[0] for one in readings]


def _read_mapping(value: Any, kinds: tuple[Any, ...]) -> Iterator[Any]:
    if isinstance(value, Mapping):
        readings = {key: _readings(one, kinds) for key, one in value.items()}
        if all(readings.values()):
            yield {key: one[0] for key, one in readings.items()}


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    if get_origin(kind) is Sequence:
        return f"a list, each {' or '.join(filter(None, map(_in_words, _kinds(*get_args(kind)))))}"
    if get_origin(kind) is Mapping:
        return "an object" if get_args(kind)[1] is Any else f"an object of {_in_words(get_args(kind)[1])} by samples"
    return _WORDS.get(kind, "")
