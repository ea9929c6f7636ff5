"""Read YAML and JSON, and keep the line of every key for errors.

Plain scalars are resolved as YAML 1.2 does: ``1e-3`` is a number and ``off`` is text, as editors show them. PyYAML's
loaders implement YAML 1.1, where both are something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dist_adamw.schedule.batch import shown

Place = tuple[Any, ...]  # keys and indices from the top of the document

_MOST_BYTES = 1_000_000
_TRUE, _FALSE, _NULL = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}, {"", "~", "null", "Null", "NULL"}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file.

    Attributes:
        file: The file; "recipe" for a mapping that was passed in code.
        line: From 1; None for a mapping.
        key: Dotted, such as "scheduler.restart_period"; "" for the whole file.
        sentence: What is wrong, the value received, and what to do.
    """

    file: str
    line: int | None
    key: str
    sentence: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.key}: {self.sentence}" if self.key else f"{where}: {self.sentence}"


class FileError(ValueError):
    """Mistakes in a file; as text, the first of them.

    Args:
        problems: At least one, in the order of lines.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        more = len(problems) - 1
        super().__init__(f"{problems[0]}" + (f" (And {more} more: dist-adamw check lists all.)" if more else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@dataclass(frozen=True, slots=True)
class Source:
    """The data of a file, and where each key is.

    Attributes:
        name: The file's path as given; "recipe" for a mapping that was passed in code.
        data: Dicts, lists, text, numbers, bools and None.
        lines: The line of each key or list element, from 1.
        changed: The places whose values are not from the file.
    """

    name: str
    data: Any
    lines: Mapping[Place, int] = field(default_factory=dict)
    changed: frozenset[Place] = frozenset()

    def problem(self, place: Place, sentence: str) -> Problem:
        """Return a problem at ``place``, or at the innermost key around it that the file has.

        One of a value that replaces the file's has no line.
        """
        if any(place[:n] in self.changed for n in range(1, len(place) + 1)):
            return Problem(f"{self.name}, as changed", None, ".".join(map(str, place)), sentence)
        line = next((self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines), None)
        return Problem(self.name, line, ".".join(map(str, place)), sentence)

    def get(self, *place: Any) -> Any:
        """Return the value at ``place``; None if the file does not have it."""
        value = self.data
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_file(path: Any) -> Source:
    """Return the data of a YAML or JSON file. Local.

    Raises:
        FileError: the file cannot be read, or is no YAML or JSON with unique keys.
    """
    name = str(path)
    try:
        if (size := Path(name).stat().st_size) > _MOST_BYTES:
            raise _at(name, None, f"the file has {size:,} bytes, which is too long for settings. Pass a YAML or JSON.")
        content = Path(name).read_bytes()
    except FileNotFoundError as error:
        raise _at(name, None, "there is no such file.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise _at(name, None, f"the file cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if name.endswith(".json"):
        content = content.replace(b"\t", b" ")  # JSON may be indented by tabs, YAML may not
    return _parse(name, content)


def _parse(name: str, content: bytes) -> Source:
    reading = _Reading(name)
    try:
        node = yaml.compose(content, _Loader)
        data = None if node is None else reading.value(node, ())
    except yaml.MarkedYAMLError as error:
        raise _marked(name, error) from error
    except yaml.reader.ReaderError as error:
        raise _at(name, None, f"the file is not text: {error.reason} at byte {error.position}.") from error
    except RecursionError as error:
        raise _at(name, None, "the file is nested too deeply.") from error
    return Source(name, data, reading.lines)


def _marked(name: str, error: yaml.MarkedYAMLError) -> FileError:
    mark = error.problem_mark or error.context_mark
    line = None if mark is None else mark.line + 1
    problem = error.problem or str(error)
    if not name.endswith((".yaml", ".yml", ".json")) or "<document start>" in problem:
        return _at(name, line, 'the file is not YAML or JSON: "key: value" is expected here. Pass a file of settings.')
    if "'\\t'" in problem:
        return _at(name, line, "there is a tab, and YAML is indented by spaces. Replace it.")
    if "mapping values are not allowed" in problem:
        return _at(name, line, 'a key is not expected here. Indent keys alike, and write a space after each ":".')
    if "could not find expected ':'" in problem:
        problem = 'a line has no key. Write "key: value", with a space after the ":"'
    context = f"{error.context}: " if error.context else ""
    return _at(name, line, f"{context}{problem.rstrip('.')}.")


def _at(name: str, line: int | None, sentence: str) -> FileError:
    return FileError([Problem(name, line, "", sentence)])


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Composes nodes, and refuses aliases: in a file of settings they save little, and may expand without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "aliases (*name) are not supported. Write the value itself",
                self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)


class _Reading:
    """Turns nodes into data, and notes lines."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.lines: dict[Place, int] = {}

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if node.tag not in _TAGS:
            self._refuse(node, f"tags such as {node.tag} are not supported. Leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(one, (*place, i)) for i, one in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _TAGS:
                self._refuse(key_node, "a key must be text or a number")
            key = self._scalar(key_node)
            inner = (*place, key)
            if key in found:
                self._refuse(key_node, f"{key} is there twice, first in line {self.lines[inner]}. Remove one")
            self.lines[inner] = key_node.start_mark.line + 1
            if value_node.value == "" and isinstance(key, str) and ":" in key and key_node.style is None:
                self._refuse(key_node, f'{key} has no value. Write a space after the ":"')
            found[key] = self.value(value_node, inner)
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        if node.style is not None:  # in quotes, or a block of text
            return text
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if text in _NULL:
            return None
        try:
            if _INT.fullmatch(text):
                return int(text.replace("_", ""))
            if _FLOAT.fullmatch(text):
                return float(re.sub(r"_|\.(?=[inIN])", "", text))
        except ValueError:  # an int of more digits than Python converts
            self._refuse(node, f"the number {shown(text)} has thousands of digits")
        return text

    def _refuse(self, node: yaml.Node, sentence: str) -> NoReturn:
        raise _at(self._name, node.start_mark.line + 1, f"{sentence}.")
