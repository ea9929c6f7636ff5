"""The sections of a recipe file, as pydantic models.

The keys of ``optimizer`` and ``scheduler`` are the arguments of `DistAdamW` and `CyclicLRWithRestarts`: their names,
types, defaults and descriptions are read from the constructors, so a new argument is a new key.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    create_model,
)

from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.averages import EMA, Mean
from dist_adamw.recipes.decay import NoDecay
from dist_adamw.schedule.batch import shown
from dist_adamw.schedule.batch_schedule import read_batch
from dist_adamw.schedule.lengths import Length
from dist_adamw.schedule.policies import POLICIES
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

CONFIG = ConfigDict(extra="forbid", strict=True, frozen=True)
_IN_CODE = "a function is built in code: pass it to make_scheduler"
# Arguments that a file does not have, and what to do.
NOT_IN_FILES: Mapping[str, str] = {
    "params": "pass the model to from_recipe",
    "mesh": "a device mesh is built in code: pass it to make_optimizer",
    "policy_fn": _IN_CODE,
    "eta_on_restart_cb": _IN_CODE,
    "eta_on_iteration_cb": _IN_CODE,
    "batch_size": 'write "size" under "batch"',
}
_LEFT_OUT = {*NOT_IN_FILES, "optimizer", "self", "return"}
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "int16")}
# Types that are more exact here than in the signature, which also takes objects.
_DTYPE_NAMES = {
    "master_dtype": Literal["float32", "int16"],
    "state_dtype": Literal["float32", "bfloat16"],
    "reduce_dtype": Literal["float32", "bfloat16"],
    "dtype": Literal["float32", "bfloat16"],
}


def _as_float(value: Any) -> Any:
    """Return text such as "1e-3", which other YAML readers make of a number, as a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]{1,3})?", value):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_int(value: Any) -> Any:
    """Return 1e6 as a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_length(value: Any, info: ValidationInfo) -> Any:
    """Return a length; the constructors check its range."""
    value = _as_int(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(
            f"{info.field_name} must be a number or a text with a unit ('2.5 epochs'), got {shown(value)}."
        )
    return value


def _check_batch(value: Any) -> Any:
    value = _as_int(value)
    read_batch(value)
    return value


_UNITS = "samples?|updates?|epochs?|tokens?|cycles?|%"
_LENGTH_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": rf"^\s*[0-9_.]+([eE][+-]?[0-9]+)?(/[0-9_.]+)?\s*({_UNITS})?\s*$"},
    ]
}
_WHOLE_SCHEMA: dict[str, Any] = {"type": "integer", "minimum": 1}
Number = Annotated[float, BeforeValidator(_as_float)]
Whole = Annotated[int, BeforeValidator(_as_int)]
LengthText = Annotated[Any, PlainValidator(_check_length), WithJsonSchema(_LENGTH_SCHEMA)]
BatchSize = Annotated[
    Any,
    PlainValidator(_check_batch),
    WithJsonSchema({"anyOf": [_WHOLE_SCHEMA, {"type": "object", "additionalProperties": _WHOLE_SCHEMA}]}),
]


def _kind(annotation: Any) -> Any:
    """Return an annotation of a constructor as the type that a file has."""
    origin, members = get_origin(annotation), get_args(annotation)
    if annotation == Length:
        return LengthText
    if annotation in (float, int):
        return Number if annotation is float else Whole
    if origin in (Union, UnionType):
        if set(get_args(Length)) <= set(members):  # `Length | None` is flat
            return LengthText | None if NoneType in members else LengthText
        kept = [_kind(one) for one in members if one not in (torch.Tensor, torch.dtype)]
        return Union[tuple(kept)]  # noqa: UP007
    if origin is tuple:
        return Annotated[list[_kind(members[0])], Field(min_length=len(members), max_length=len(members))]  # type: ignore[misc]
    if origin is Sequence:
        return list[_kind(members[0])]  # type: ignore[misc]
    return annotation


def _descriptions(made: type) -> dict[str, str]:
    found = docstring_parser.parse(inspect.getdoc(made) or "", docstring_parser.DocstringStyle.GOOGLE)
    return {one.arg_name: _as_of_a_file(one.description or "") for one in found.params}


def _as_of_a_file(text: str) -> str:
    """Return a description on one line, with the words of YAML in place of Python's."""
    text = " ".join(text.split()).replace("``", "`").replace("torch.float32", "float32")
    text = text.replace("torch.bfloat16", "bfloat16").replace("torch.int16", "int16").replace('float("inf")', ".inf")
    return re.sub(r"\b(None|True|False)\b", lambda found: "null" if found[0] == "None" else found[0].lower(), text)


def _section(
    name: str, made: type, special: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> type[BaseModel]:
    """Return the model of the arguments of a constructor.

    Args:
        name: Of the model.
        made: The class.
        special: Types of arguments that a file has in another type.
        more: Further keys: type, default and description.
    """
    types, about = get_type_hints(made.__init__), _descriptions(made)  # type: ignore[misc]
    keys: dict[str, Any] = {}
    for one in inspect.signature(made).parameters.values():
        if one.name in _LEFT_OUT:
            continue
        kind = special.get(one.name) or _kind(types[one.name])
        if one.name in _DTYPE_NAMES:
            kind = _DTYPE_NAMES[one.name] | None
        default = list(one.default) if isinstance(one.default, tuple) else one.default
        keys[one.name] = (kind, Field(default, description=about[one.name]))
    for key, (kind, default, text) in (more or {}).items():
        keys[key] = (kind, Field(default, description=text))
    doc = (inspect.getdoc(made) or "").partition("\n")[0]
    return create_model(name, __config__=CONFIG, __doc__=f"Arguments of {made.__name__}. {doc}", **keys)


AVERAGES: Mapping[str, type[BaseModel]] = {"EMA": _section("EMA", EMA, {}), "Mean": _section("Mean", Mean, {})}


def average_kind(value: Any) -> str:
    """Return the kind of an average by its keys, as `check_averages` does."""
    return "EMA" if isinstance(value, Mapping) and {"decay", "timescale"} & value.keys() else "Mean"


_EACH: list[Any] = [Annotated[of, Tag(kind)] for kind, of in AVERAGES.items()]
_Average: Any = Annotated[functools.reduce(operator.or_, _EACH), Discriminator(average_kind)]
_NO_DECAY_TEXT = (
    "Parameters without weight decay: `norms_and_biases` (as in transformers' Trainer, and all normalisation layers of "
    "torch), `one_dimensional` (biases, gains and scalars: fewer than two axes), a list of patterns of parameter names "
    "(`*.bias`), or `none`."
)
OptimizerSection = _section(
    "Optimizer",
    DistAdamW,
    {"lr": Number, "shard": bool | Literal["auto"], "averages": dict[str, _Average] | None},
    {"no_decay": (NoDecay, "none", _NO_DECAY_TEXT)},
)
_ENDS = Annotated[list[LengthText], Field(min_length=1)] | None
SchedulerSection = _section("Scheduler", CyclicLRWithRestarts, {"policy": Literal[POLICIES], "cycle_ends": _ENDS})


class BatchSection(BaseModel):
    """The global batch. Accumulation makes up for what the ranks do not compute at once."""

    model_config = CONFIG

    size: BatchSize | None = Field(
        default=None,
        description="Samples of one update over all ranks, or a schedule of them by samples or lengths with a unit, "
        "such as {0: 256, 2 epochs: 512}. Without it, `prepare` takes the batch from the loader and the accelerator.",
    )
    micro_batch_size: Annotated[int, Field(gt=0), BeforeValidator(_as_int)] | None = Field(
        default=None, description="Samples of one rank in one forward pass."
    )


class TrainingSection(BaseModel):
    """The length of training. The schedule does not depend on it, unless it has a `total_samples` too."""

    model_config = CONFIG

    total_samples: LengthText | None = Field(
        default=None,
        description="Samples of the whole training, warm-up included, or a text with a unit, such as 15 epochs.",
    )


class RecipeFile(BaseModel):
    """A training recipe: optimizer, schedule and batch, for any engine and any number of ranks."""

    model_config = CONFIG

    optimizer: OptimizerSection = OptimizerSection()  # type: ignore[valid-type]
    scheduler: SchedulerSection = SchedulerSection()  # type: ignore[valid-type]
    batch: BatchSection = BatchSection()
    training: TrainingSection = TrainingSection()


SECTIONS: Mapping[str, type[BaseModel]] = {
    "optimizer": OptimizerSection,
    "scheduler": SchedulerSection,
    "batch": BatchSection,
    "training": TrainingSection,
}
