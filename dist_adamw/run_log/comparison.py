"""Find the first update, and the first parameter or micro-batch, at which two run logs differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_adamw.run_log.log_file import Log, Record, read_log

_SHOWN = 4  # micro-batches or modules in a line
_WIDTH = 60  # characters of a fact


@dataclass(frozen=True, slots=True)
class Difference:
    """The first differences between pairs of records.

    Attributes:
        batches: The pair in which micro-batches differ first.
        parameters: The pair in which parameters differ first.
        equal_before: The last update before it at which parameters were compared.
    """

    batches: tuple[Record, Record] | None = None
    parameters: tuple[Record, Record] | None = None
    equal_before: int | None = None


def first_difference(pairs: Iterable[tuple[Record, Record]]) -> Difference:
    """Return the first differences between records of the same updates, in their order. Local."""
    batches, parameters, equal = None, None, None
    for one, other in pairs:
        if batches is None and _both(one.batches, other.batches) and one.batches != other.batches:
            batches = (one, other)
        if parameters is None and _both(one.root, other.root):
            if one.root != other.root:
                parameters = (one, other)
            else:
                equal = one.number
    return Difference(batches, parameters, equal)


def _both(one: bytes, other: bytes) -> bool:
    return bool(one) and bool(other)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare_runs`; ``print`` it.

    Attributes:
        lines: The description.
        is_equal: Whether the runs are equal in the updates that were compared.
        data: The same as plain data.
    """

    lines: tuple[str, ...]
    is_equal: bool
    data: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def compare_runs(path_a: str | Path, path_b: str | Path) -> Comparison:
    """Return the first difference between two runs. Local.

    The same run twice: its updates before a resume are compared with those that replaced them.

    Raises:
        ValueError: there is no log, or the runs have no update or no parameter names in common.
    """
    log_a = read_log(path_a)
    log_b = read_log(path_b)
    if log_a.path.samefile(log_b.path):
        return _compare_with_itself(log_a)
    numbers = [number for number in log_a.records if number in log_b.records]
    if not numbers:
        raise ValueError(f"no update is in both runs: A has {_range(log_a)}, and B has {_range(log_b)}.")
    pairs = [(log_a.records[number], log_b.records[number]) for number in numbers]
    _check_names(pairs[0])
    compares = [(_both(one.batches, two.batches), _both(one.root, two.root)) for one, two in pairs]
    difference = first_difference(pairs)
    lines = [f"compared: {len(numbers):,} updates, {numbers[0]:,} to {numbers[-1]:,}"]
    lines += _missing(any(batches for batches, _ in compares), any(roots for _, roots in compares))
    lines += _describe(difference)
    lines += _facts(pairs, difference)
    notes = []
    for name, log in (("A", log_a), ("B", log_b)):
        again = first_difference(_resumed(log))
        if again.batches or again.parameters:
            notes.append(f"{name} was resumed, and differs from its updates before: dist-adamw diff {name} {name}")
        if log.damaged:
            notes.append(f"{name} has {_damaged(log.damaged)} left out")
    return _comparison(lines, pairs, difference, notes)


def _comparison(
    lines: list[str], pairs: list[tuple[Record, Record]], difference: Difference, notes: Sequence[str] = ()
) -> Comparison:
    is_equal = difference == Difference(equal_before=difference.equal_before)
    batches, parameters = difference.batches, difference.parameters
    data: dict[str, Any] = {
        "equal": is_equal,
        "compared": {"updates": len(pairs)},
        "batches": None,
        "parameters": None,
        "cause": _cause(difference),
        "facts": {name: list(values) for name, values in _differing_facts(pairs, difference).items()},
        "notes": list(notes),
    }
    if pairs:
        data["compared"] |= {"first": pairs[0][0].number, "last": pairs[-1][0].number}
    if batches is not None:
        counts = [record.batch_count for record in batches]
        data["batches"] = {"update": batches[0].number, "counts": counts, "micro_batches": _differing_batches(batches)}
    if parameters is not None:
        before = difference.equal_before
        data["parameters"] = {
            "update": parameters[0].number,
            "equal_at": before,
            "names": _differing_parameters(parameters),
        }
    return Comparison((*lines, *notes), is_equal, data)


def _damaged(number: int) -> str:
    return "1 damaged line, which was" if number == 1 else f"{number} damaged lines, which were"


def _compare_with_itself(log: Log) -> Comparison:
    pairs = _resumed(log)
    if not pairs:
        line = f"{log.path} has {_range(log)}, and no update twice: nothing to compare"
        return _comparison([line], [], Difference())
    difference = first_difference(pairs)
    lines = [f"compared: {len(pairs):,} updates that were logged again after a resume, from {pairs[0][0].number:,} on"]
    lines += [*_describe(difference), *_facts(pairs, difference)]
    return _comparison(lines, pairs, difference)


def _resumed(log: Log) -> list[tuple[Record, Record]]:
    pairs = [(one, two) for one, two in log.replaced if one.header.parameters == two.header.parameters]
    return sorted(pairs, key=lambda pair: pair[0].number)


def _range(log: Log) -> str:
    return f"updates {min(log.records):,} to {max(log.records):,}"


def _check_names(pair: tuple[Record, Record]) -> None:
    names = [record.header.parameters for record in pair]
    if names[0] == names[1]:
        return
    if set(names[0]) == set(names[1]):
        raise ValueError("the runs have the same parameters in another order. Compare runs of one model.")
    lone = next((name, run) for run, other in ((0, 1), (1, 0)) for name in names[run] if name not in names[other])
    raise ValueError(f"the parameter {lone[0]!r} is only in run {'AB'[lone[1]]}. Compare runs of one model.")


def _missing(has_batches: bool, has_parameters: bool) -> list[str]:
    lines = []
    if not has_batches:
        lines.append("batches: not compared, they are not in both logs (call log.batch(batch), or use prepare)")
    if not has_parameters:
        lines.append("parameters: not compared, no update has them in both logs (RunLog's `every` differs)")
    return lines


# ---------------------------------------------------------------- in words


def _describe(difference: Difference) -> list[str]:
    lines = []
    if difference.batches is not None:
        lines.append(f"batches differ first at update {difference.batches[0].number:,}: {_batches(difference.batches)}")
    if difference.parameters is not None:
        lines += _parameters(difference.parameters, difference.equal_before)
    lines.append(_cause(difference))
    return lines


def _batches(pair: tuple[Record, Record]) -> str:
    one, two = pair
    if one.batch_count != two.batch_count:
        return f"{one.batch_count} micro-batches and {two.batch_count}"
    found = _differing_batches(pair)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    word = "micro-batch" if len(found) == 1 else "micro-batches"
    return f"{word} {', '.join(map(str, found[:_SHOWN]))}{more} of 0 to {one.batch_count - 1}"


def _differing_batches(pair: tuple[Record, Record]) -> list[int]:
    one, two = pair
    return [i for i in range(min(one.batch_count, two.batch_count)) if one.batch(i) != two.batch(i)]


def _differing_parameters(pair: tuple[Record, Record]) -> list[str]:
    one, two = pair
    return [name for i, name in enumerate(one.header.parameters) if one.parameter(i) != two.parameter(i)]


def _parameters(pair: tuple[Record, Record], equal_before: int | None) -> list[str]:
    one, _ = pair
    names = one.header.parameters
    found = _differing_parameters(pair)
    when = "" if equal_before is None or equal_before == one.number - 1 else f" (equal at update {equal_before:,})"
    start = f"parameters differ first at update {one.number:,}{when}"
    if not found:
        return [f"{start}: it is not known which, since their 16 bits are equal"]
    lines = [f"{start}: {found[0]}"]
    if len(found) > 1:
        modules, sizes = Counter(map(_module, found)), Counter(map(_module, names))
        shown = [f"{name} ({count} of {sizes[name]})" for name, count in [*modules.items()][:_SHOWN]]
        more = f" and {len(modules) - _SHOWN} more modules" if len(modules) > _SHOWN else ""
        lines.append(f"  and {len(found) - 1} more of {len(names)} parameters: {', '.join(shown)}{more}")
    return lines


def _module(name: str) -> str:
    """Return the group of parameters that ``name`` is shown in: a numbered layer, or the first part of the name."""
    numbered = re.match(r"(?:[^.]*[^.\d][^.]*\.)*?\d+(?=\.)", name)
    prefix = numbered.group() if numbered else name.partition(".")[0]
    return prefix if prefix == name else f"{prefix}.*"


def _cause(difference: Difference) -> str:
    batches, parameters = difference.batches, difference.parameters
    if batches is None and parameters is None:
        return "equal"
    if batches is None:
        return "the batches are equal: the cause is the weights at the start, the options or the arithmetic"
    if parameters is None:
        return "the parameters are equal: the batches that differ did not change them"
    if batches[0].number <= parameters[0].number:
        return "the cause: the batch"
    return "the parameters differ before the batches: the cause is the weights at the start, options or arithmetic"


def _facts(pairs: list[tuple[Record, Record]], difference: Difference) -> list[str]:
    """Describe facts that differ, where the runs do, or at the first update."""
    differing = _differing_facts(pairs, difference)
    lines = [f"  {name}: {_short(ours)} and {_short(theirs)}" for name, (ours, theirs) in differing.items()]
    return ["the runs also differ in:", *lines] if lines else []


def _differing_facts(pairs: list[tuple[Record, Record]], difference: Difference) -> dict[str, tuple[Any, Any]]:
    pair = difference.parameters or difference.batches or (pairs[0] if pairs else None)
    if pair is None:
        return {}
    ours, theirs = (record.header.facts for record in pair)
    names = [name for name in [*ours, *(set(theirs) - set(ours))] if ours.get(name) != theirs.get(name)]
    return {name: (ours.get(name), theirs.get(name)) for name in names}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
