"""Read a function's signature as a command line."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument or option.

    Attributes:
        name: As in the function.
        kind: Its type, without None.
        help: From the docstring.
        is_positional: Whether it is positional.
        takes_many: Whether it takes all further positional arguments.
        is_required: Whether it has no default.
        default: Its default.
        owner: The parameter of the function that it is a field of; "" for a parameter itself.
    """

    name: str
    kind: Any
    help: str
    is_positional: bool
    takes_many: bool
    is_required: bool
    default: Any
    owner: str = ""

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value."""
        return self.kind is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it can be; empty: others too."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else ()


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of a function; of one whose type is a dataclass, the fields. Local."""
    hints, helps = typing.get_type_hints(function), _helps(function)
    found = []
    for name, one in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            found += [dataclasses.replace(field, owner=name) for field in _fields(hints[name])]
            continue
        is_required, takes_many = one.default is one.empty, one.kind is one.VAR_POSITIONAL
        found.append(
            Parameter(
                name,
                _without_none(hints[name]),
                helps.get(name, ""),
                is_positional=one.kind in _POSITIONAL,
                takes_many=takes_many,
                is_required=is_required and not takes_many,
                default=None if is_required else one.default,
            )
        )
    return found


def _fields(kind: Any) -> list[Parameter]:
    hints, helps = typing.get_type_hints(kind), _helps(kind)
    return [
        Parameter(one.name, _without_none(hints[one.name]), helps.get(one.name, ""), False, False, False, one.default)
        for one in dataclasses.fields(kind)
    ]


def _helps(documented: Any) -> dict[str, str]:
    from docstring_parser import parse

    params = parse(inspect.getdoc(documented) or "").params
    return {one.arg_name: " ".join((one.description or "").split()) for one in params}


def _without_none(kind: Any) -> Any:
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    return parts[0] if len(parts) == 1 else typing.Union[tuple(parts)]  # noqa: UP007


def body_of(function: Callable[..., Any]) -> str:
    """Return the docstring without its arguments."""
    from docstring_parser import parse

    doc = parse(inspect.getdoc(function) or "")
    return "\n\n".join(part for part in (doc.short_description, doc.long_description) if part)


def describe(kind: Any) -> str:
    """Return a type in words, after "must be"."""
    if choices := typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ():
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(describe, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list such as [{_EXAMPLES.get(typing.get_args(kind)[0], '1 epoch, 3 epochs')}]"
    if typing.get_origin(kind) is dict:
        return "a mapping such as {0: 256, 2 epochs: 512}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


_EXAMPLES = {float: "1.0, 0.5", str: "a, b"}
