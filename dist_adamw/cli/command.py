"""Run the command: find the verb, call it, and print its answer or one sentence."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from dist_adamw._version import __version__
from dist_adamw.cli.answer import CANNOT, Answer
from dist_adamw.cli.arguments import HelpAskedError, UsageError, did_you_mean, read_arguments
from dist_adamw.cli.helping import help_of, overview
from dist_adamw.cli.verbs import VERBS
from dist_adamw.json_text import json_text

_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; print a user's mistake as one sentence, with exit status 2."""
    args = sys.argv[1:] if args is None else args
    try:
        answer, is_json = _answer(list(args))
        if isinstance(answer, Answer):
            return _print(answer, is_json)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except UsageError as error:
        is_verb = bool(args) and args[0] in VERBS
        return _refuse(args, f"{error} See dist-adamw {args[0] + ' ' if is_verb else ''}--help.")
    except (ValueError, ModuleNotFoundError, OSError, ArithmeticError) as error:
        return _refuse(args, _sentence(error))
    # Outside of the `try`: the errors of a script are its own.
    return answer()


def _verb(typed: str) -> str:
    """Return the name of the verb that was typed, also with an underscore."""
    if typed.startswith("-"):
        raise UsageError(f"name a verb before its options: {', '.join(VERBS)}.")
    name = typed.replace("_", "-")
    if name not in VERBS:
        hint = did_you_mean(typed, [*VERBS, "--version"]) or f" It has {_verbs()}."
        raise UsageError(f"there is no verb {typed!r}.{hint}")
    return name


def _answer(args: list[str]) -> tuple[Answer | Callable[[], int], bool]:
    """Return the verb's answer, or the rest of its work, and whether to print JSON."""
    if not args or args[0] in ("-h", "--help") or args == ["help"]:
        return Answer(overview(), {}), False
    if args[0] in ("-V", "--version"):
        return Answer(f"dist-adamw {__version__}", {}), False
    if args[0] == "help":
        args = [*args[1:2], "--help"]
    name, *rest = args
    name = _verb(name)
    try:
        positional, options, is_json = read_arguments(name, VERBS[name], rest)
    except HelpAskedError:
        return Answer(help_of(name, VERBS[name]), {}), False
    return VERBS[name].function(*positional, **options), is_json


def _verbs() -> str:
    return ", ".join(VERBS)


def _print(answer: Answer, is_json: bool) -> int:
    """Print an answer; return its status, also if the reader has closed the pipe."""
    text = answer.as_json() if is_json else answer.as_text()
    for note in answer.notes:
        print(f"dist-adamw: {note}", file=sys.stderr)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would flush stdout again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return answer.status


def _refuse(args: Sequence[str], sentence: str) -> int:
    """Print why there is no answer: to stderr, and with ``--json`` to stdout too."""
    print(f"dist-adamw: {sentence}", file=sys.stderr)
    if "--json" in args:
        with contextlib.suppress(OSError):  # it may be what failed
            print(json_text({"error": sentence}), flush=True)
    return CANNOT


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, ArithmeticError):
        return f"a number is out of the range that can be computed with: {error}. Check the largest and the smallest."
    return str(error) or type(error).__name__
