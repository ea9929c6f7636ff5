"""Read a verb's arguments: dashes and underscores are the same, and a mistake is one sentence with a hint."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from dist_adamw.cli.signature import Parameter, describe, parameters_of
from dist_adamw.cli.verbs import Verb

_TRUE, _FALSE = ("true", "yes"), ("false", "no")


class UsageError(ValueError):
    """The command line is wrong."""


class HelpAskedError(Exception):
    """The help was asked for."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?", or "" if no known word is near."""
    known = list(known)
    near = [word] if word in known else difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    near = near or [one for one in known if len(word) > 2 and (one.startswith(word) or word in one)][:3]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def read_arguments(name: str, verb: Verb, args: Sequence[str]) -> tuple[list[Any], dict[str, Any], bool]:
    """Return positional arguments and keywords for a verb's function, and whether ``--json`` was given. Local.

    Options that are not given are left out, so that the function's defaults hold.

    Raises:
        UsageError: an option is unknown, or a value is missing, superfluous, or of another type.
        HelpAskedError: ``--help`` was given.
    """
    parameters = parameters_of(verb.function)
    places, texts, is_json = _split(name, verb, parameters, list(args))
    positional = _positional(name, [one for one in parameters if one.is_positional], places)
    options = [one for one in parameters if not one.is_positional]
    if missing := [f"--{one.name}" for one in options if one.is_required and one.name not in texts]:
        raise UsageError(f"{name} needs {' and '.join(missing)}.")
    values: dict[str, Any] = {}
    owned: dict[str, dict[str, Any]] = {one.owner: {} for one in options if one.owner}
    for one in options:
        if one.name in texts:
            (owned[one.owner] if one.owner else values)[one.name] = _value(one, texts[one.name])
    hints = typing.get_type_hints(verb.function)
    for owner, fields in owned.items():
        values[owner] = hints[owner](**fields)
    if "json" in {one.name for one in parameters}:  # the verb prints by itself
        values["json"], is_json = is_json, False
    return positional, values, is_json


def _split(
    name: str, verb: Verb, parameters: Sequence[Parameter], rest: list[str]
) -> tuple[list[str], dict[str, list[str]], bool]:
    """Return positional arguments, the values of each option that is given, and whether ``--json`` is."""
    options = {one.name: one for one in parameters if not one.is_positional}
    places: list[str] = []
    texts: dict[str, list[str]] = {}
    is_json = False
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            places += rest
            break
        if not arg.startswith("-") or re.match(r"-(\.?[0-9]|$)", arg):  # a negative number is a value
            places.append(arg)
            if verb.passes_on:
                places += rest
                break
            continue
        word, has_value, value = arg.lstrip("-").partition("=")
        word = word.replace("-", "_")
        if arg in ("-h", "--help"):
            raise HelpAskedError
        if word == "json" and not has_value:
            is_json = True
            continue
        option, given = options.get(word), value if has_value else None
        if option is None and word.removeprefix("no_") in options and options[word.removeprefix("no_")].is_flag:
            option, given = options[word.removeprefix("no_")], "false"
        if option is None or not arg.startswith("--"):
            raise UsageError(f"{name} has no option {arg.partition('=')[0]}.{_hint(word, parameters)}")
        if given is None and option.is_flag:
            given = rest.pop(0) if rest and rest[0].lower() in (*_TRUE, *_FALSE) else "true"
        if given is None:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{option.name} needs a value: {describe(option.kind)}.")
            given = rest.pop(0)
        texts.setdefault(option.name, []).append(given)
    return places, texts, is_json


def _hint(word: str, parameters: Iterable[Parameter]) -> str:
    if word in [one.name for one in parameters if one.is_positional]:
        return f" Pass {word.upper()} without a name."
    options = [one.name for one in parameters if not one.is_positional]
    return did_you_mean(f"--{word}", [f"--{one}" for one in (*options, "json", "help")])


def _positional(name: str, wanted: Sequence[Parameter], places: Sequence[str]) -> list[Any]:
    shown = " ".join(one.name.upper() for one in wanted)
    required = [one for one in wanted if one.is_required]
    if len(places) < len(required):
        missing = " and ".join(one.name.upper() for one in required[len(places) :])
        raise UsageError(f"{name} needs {missing}: dist-adamw {name} {shown}.")
    takes_many = any(one.takes_many for one in wanted)
    if len(places) > len(wanted) and not takes_many:
        what = f"takes {shown}" if wanted else "takes options only"
        raise UsageError(f"{name} {what}, and {places[len(wanted)]!r} is one argument too many.")
    values: list[Any] = [_value(one, [place]) for one, place in zip(wanted, places, strict=False)]
    return values + list(places[len(wanted) :])


def _value(one: Parameter, texts: Sequence[str]) -> Any:
    """Return the value of the type that the parameter has; the last one given counts, except in a list."""
    if typing.get_origin(one.kind) is list and not texts[-1].lstrip().startswith("["):
        (item,) = typing.get_args(one.kind)
        return [_converted(one, item, text) for text in texts]
    return _converted(one, one.kind, texts[-1])


def _converted(one: Parameter, kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    import argparse

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        value = parser.parse_args([f"--value={text}"]).value
    except (argparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
        raise _wrong(one, text) from error
    if value is None:  # jsonargparse takes "null" for any type
        raise _wrong(one, text)
    return value


def _wrong(one: Parameter, text: str) -> UsageError:
    shown = one.name.upper() if one.is_positional else f"--{one.name}"
    hint = did_you_mean(text, one.choices)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return UsageError(f"{shown} must be {describe(one.kind)}, got {text!r}.{hint}")
