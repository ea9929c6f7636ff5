"""Put what pydantic finds in a recipe into one sentence each, with file, line and key."""

from __future__ import annotations

import copy
import difflib
import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_adamw.recipes.sections import AVERAGES, NOT_IN_FILES, SECTIONS, average_kind
from dist_adamw.recipes.source import Place, Problem, Source
from dist_adamw.schedule.batch import shown

# What other libraries call a key: its section and name here.
_OTHER_NAMES = {
    "learning_rate": ("optimizer", "lr"),
    "adam_epsilon": ("optimizer", "eps"),
    "beta1": ("optimizer", "betas"),
    "beta2": ("optimizer", "betas"),
    "gradient_clipping": ("optimizer", "max_grad_norm"),
    "grad_clip": ("optimizer", "max_grad_norm"),
    "clip_grad_norm": ("optimizer", "max_grad_norm"),
    "warmup": ("scheduler", "warmup_samples"),
    "warmup_steps": ("scheduler", "warmup_samples"),
    "lr_scheduler_type": ("scheduler", "policy"),
    "eta_min": ("scheduler", "min_lr"),
    "T_0": ("scheduler", "restart_period"),
    "T_mult": ("scheduler", "t_mult"),
    "train_batch_size": ("batch", "size"),
    "batch_size": ("batch", "size"),
    "global_batch": ("batch", "size"),
    "micro_batch": ("batch", "micro_batch_size"),
    "per_device_train_batch_size": ("batch", "micro_batch_size"),
    "epochs": ("training", "total_samples"),
    "num_train_epochs": ("training", "total_samples"),
}
_UNKNOWN = ("extra_forbidden", "invalid_key")  # what pydantic calls an unknown key
_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "null": "null",
    "array": "a list",
    "object": "keys with values",
}


def problems_of(error: ValidationError, source: Source) -> list[Problem]:
    """Return one problem for each key that pydantic refused, in the order of lines. Local."""
    found: dict[Place, str] = {}
    for one in error.errors(include_url=False):
        place = _place(source.data, one["loc"])
        if one["type"] in _UNKNOWN:
            place = _place_of_unknown(source.data, one["loc"])
            found[place] = _unknown(place)
            continue
        place = place if place[1:2] == ("averages",) else place[:2]
        if one["type"] == "value_error":
            sentence = str(one["ctx"]["error"])
        else:
            sentence = _of_another_kind(place, source.get(*place))
        found.setdefault(place, sentence)
    problems = [source.problem(place, sentence) for place, sentence in found.items()]
    return sorted(problems, key=lambda problem: problem.line or 0)


def _is_of_unknown_key(error: Mapping[str, Any]) -> bool:
    return error["type"] in _UNKNOWN and error["loc"][-1] not in _OTHER_NAMES


def _moved(lines: Mapping[Place, int], place: Place, meant: Place) -> dict[Place, int]:
    """Return the lines of what is at ``place``, as if it were at ``meant``."""
    return {(*meant, *at[len(place) :]): line for at, line in lines.items() if at[: len(place)] == place}


def with_corrected_keys(error: ValidationError, source: Source) -> Source | None:
    """Return the file with every unknown key under the name that was probably meant, or without it. Local.

    Returns:
        None if a value is of the wrong kind, a key is not text, or a key has the name and perhaps the unit of another
        library: what depends on it cannot be checked.
    """
    errors = error.errors(include_url=False)
    if not all(map(_is_of_unknown_key, errors)):
        return None
    data, lines = copy.deepcopy(source.data), dict(source.lines)
    for one in errors:
        place = _place_of_unknown(source.data, one["loc"])
        around = functools.reduce(operator.getitem, place[:-1], data)
        if place[-1] not in around:  # a key such as 1.5, of which pydantic gives the text
            return None
        meant, value = _meant(place), around.pop(place[-1])
        if meant is not None and _add(data, meant, value):
            lines |= _moved(lines, place, meant)
    data = {name: keys for name, keys in data.items() if keys != {}}
    return replace(source, data=data, lines=lines) if data else None


def _add(data: dict[Any, Any], place: Place, value: Any) -> bool:
    """Add a value at ``place``; return False if there is one."""
    around = data if len(place) == 1 else data.setdefault(place[0], {})
    if not isinstance(around, dict) or place[-1] in around:
        return False
    around[place[-1]] = value
    return True


def _place_of_unknown(data: Any, loc: tuple[Any, ...]) -> Place:
    place = _place(data, loc)
    return place if place[-1:] == loc[-1:] else (*place, loc[-1])


def _meant(place: Place) -> Place | None:
    """Return the place of the key that ``place`` was probably meant for."""
    key, section = place[-1], place[0] if len(place) == 2 else None
    if len(place) > 2 or key in NOT_IN_FILES:
        return None
    homes = [(name, key) for name, model in SECTIONS.items() if key in model.model_fields]
    if homes:
        return homes[0]
    here = SECTIONS if section is None else SECTIONS[section].model_fields
    near = difflib.get_close_matches(str(key), here, n=1)
    return (*place[:-1], near[0]) if near else None


def _place(data: Any, loc: tuple[Any, ...]) -> Place:
    """Return the keys in ``loc``, without the names that pydantic gives to the members of a union."""
    place: list[Any] = []
    for step in loc:
        is_index = isinstance(data, list) and isinstance(step, int) and step < len(data)
        if is_index or (isinstance(data, dict) and step in data):
            data = data[step]
            place.append(step)
    return tuple(place)


def _of_another_kind(place: Place, value: Any) -> str:
    key = place[-1] if place else "a recipe"
    if len(place) == 1:
        sections = f"{', '.join(SECTIONS)}"
        advice = "Indent its keys below it, or leave it out." if key in SECTIONS else f"Sections are {sections}."
        return f"{key} must have keys and values, got {_in_yaml(value)}. {advice}"
    properties = _properties_at(place)
    wanted = _in_words(properties[key]) if key in properties else "the options of an average, such as {decay: 0.999}"
    advice = ""
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        advice = f" Write {str(value.lower() in ('yes', 'on')).lower()}: {value} is text in YAML 1.2."
    elif value is None:
        advice = " Leave it out for the default."
    return f"{key} must be {wanted}, got {_in_yaml(value)}.{advice}"


def _in_yaml(value: Any) -> str:
    return (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else shown(value)
    )


def _properties_at(place: Place) -> Mapping[str, Any]:
    """Return the JSON schemas of the keys around ``place``."""
    model: type[BaseModel] = SECTIONS[place[0]]
    if place[1] == "averages" and len(place) == 4:
        model = AVERAGES[average_kind({place[3]: None})]
    properties: Mapping[str, Any] = model.model_json_schema()["properties"]
    return properties if place[1:2] != ("averages",) or len(place) != 3 else {}


def _in_words(schema: Mapping[str, Any]) -> str:
    members = list(_member_words(schema))
    return " or ".join([", ".join(members[:-1]), members[-1]] if len(members) > 2 else members)


def _member_words(schema: Mapping[str, Any]) -> Iterator[str]:
    for one in schema.get("anyOf", [schema]):
        if "enum" in one or "const" in one:
            yield from (repr(value) for value in one.get("enum", [one.get("const")]))
        elif "pattern" in one:
            yield "a length such as '2.5 epochs'"
        elif one.get("type") == "boolean":
            yield from ("true", "false")
        elif one.get("type") == "integer" and "exclusiveMinimum" in one:
            yield "a whole number above 0"
        elif one.get("type") == "array" and "pattern" in str(one["items"]):
            yield "a list of lengths"
        elif one.get("type") == "array" and "maxItems" in one:
            yield f"a list of {one['minItems']} numbers"
        elif one.get("type") == "array" and one["items"].get("type") == "number":
            yield "a list of numbers"
        else:
            yield _WORDS.get(one.get("type", "object"), "keys with values")


def _unknown(place: Place) -> str:
    """Return the sentence for a key that its section does not have."""
    key = place[-1]
    if len(place) == 4:
        options = "; ".join(f"{', '.join(of.model_fields)} ({kind})" for kind, of in AVERAGES.items())
        return f"an average has no option {key!r}. Options are {options}."
    section = place[0] if len(place) == 2 else None
    if section is not None and key in NOT_IN_FILES:
        return f"{key} does not belong here: {NOT_IN_FILES[key]}."
    if key in _OTHER_NAMES:
        where, name = _OTHER_NAMES[key]
        return f"there is no {key!r}. It is {name}{'' if where == section else f', under {where}'}."
    homes = [name for name, model in SECTIONS.items() if key in model.model_fields]
    if homes:
        return f"{key} belongs in {' or '.join(homes)}{f', not in {section}' if section else ''}. Move it there."
    return f"there is no {key!r}{f' in {section}' if section else ''}. {_nearest(section, str(key))}"


def _nearest(section: str | None, key: str) -> str:
    here = list(SECTIONS if section is None else SECTIONS[section].model_fields)
    if near := difflib.get_close_matches(key, here, n=1):
        return f"Did you mean {near[0]}?"
    for name, model in SECTIONS.items():
        if near := difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.8):
            return f"Did you mean {near[0]}, in {name}?"
    return f"{'Sections' if section is None else 'Its keys'} are {', '.join(here)}."
