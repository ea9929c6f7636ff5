"""The help of the command and of its verbs, and the parser that shells complete from."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from dist_adamw._version import __version__
from dist_adamw.cli.signature import Parameter, body_of, describe, parameters_of
from dist_adamw.cli.verbs import VERBS, Verb

STATUSES = """\
exit status:
  0  done
  1  the answer is no: runs differ, a checkpoint is not whole, files have problems, nothing fits
  2  the question cannot be answered; stderr says why"""
_JSON = "Print one JSON document to stdout."
_FILES = ("recipe", "recipes", "path", "source", "target", "run_a", "run_b", "script", "out", "plot", "optimizer")


def overview() -> str:
    """Return what ``dist-adamw`` alone prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    first = next(iter(VERBS))
    return "\n".join(
        [
            f"dist-adamw {__version__}: AdamW with warm restarts, in samples, on any engine and number of ranks",
            "",
            *lines,
            "",
            "for example:",
            f"  dist-adamw {first} {VERBS[first].examples[0]}",
            "",
            "dist-adamw VERB --help: a verb's options. --version: the version.",
            STATUSES,
        ]
    )


def help_of(name: str, verb: Verb) -> str:
    """Return the help of a verb."""
    parser = _fill(argparse.ArgumentParser(formatter_class=_Formatter, allow_abbrev=False), name, verb)
    return parser.format_help().rstrip()


def make_command_parser() -> argparse.ArgumentParser:
    """Return a parser of the whole command, from which completion scripts are made."""
    parser = argparse.ArgumentParser("dist-adamw", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="Print the version.")
    verbs = parser.add_subparsers()
    for name, verb in VERBS.items():
        _fill(verbs.add_parser(name, help=_escaped(verb.summary), formatter_class=_Formatter), name, verb)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(110, shutil.get_terminal_size((110, 24)).columns))


def _fill(parser: argparse.ArgumentParser, name: str, verb: Verb) -> argparse.ArgumentParser:
    parameters = parameters_of(verb.function)
    examples = [f"  dist-adamw {name} {example}" for example in verb.examples]
    parser.description = body_of(verb.function)
    parser.epilog = "\n".join(["for example:", *examples, "", STATUSES])
    shown = [_usage(one) for one in parameters if one.is_positional]
    parser.usage = " ".join(["dist-adamw", name, *(["[options]", *shown] if verb.passes_on else [*shown, "[options]"])])
    for one in parameters:
        if one.name != "json":
            _add(parser, one)
    parser.add_argument("--json", action="store_true", help=_JSON)
    return parser


def _usage(one: Parameter) -> str:
    if one.takes_many:
        return f"[{one.name.upper()} ...]"
    return one.name.upper() if one.is_required else f"[{one.name.upper()}]"


def _add(parser: argparse.ArgumentParser, one: Parameter) -> None:
    options: dict[str, Any] = {"help": _escaped(_help(one))}
    if one.is_flag:
        action = parser.add_argument(f"--{one.name}", action=argparse.BooleanOptionalAction, **options)
    elif one.is_positional:
        nargs = "*" if one.takes_many else None if one.is_required else "?"
        action = parser.add_argument(one.name, nargs=nargs, metavar=one.name.upper(), **options)
    else:
        action = parser.add_argument(f"--{one.name}", metavar=one.name.upper(), **options)
    if one.choices:
        action.choices = one.choices
    if one.name in _FILES:
        action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]


def _help(one: Parameter) -> str:
    """Return the help of a parameter, with its type if that does not say it, and its default if the text has none."""
    facts = []
    if one.choices and one.choices[0] not in one.help:
        facts.append(describe(one.kind))
    if one.default not in (None, False) and "efault" not in one.help:
        facts.append(f"default: {one.default}")
    return f"{one.help} ({'; '.join(facts)})" if facts else one.help


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
