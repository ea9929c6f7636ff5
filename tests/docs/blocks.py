"""The code blocks of README.md and the pages: read with Sybil, run in order, one namespace for each page.

``python`` blocks run. A block with a title, ``python title="train.py"``, is written to that file instead. Of ``sh``
blocks, lines that begin with ``dist-adamw`` run, in this process; other commands are named in `commands.ELSEWHERE`.
``json`` and ``yaml`` are parsed. ``text`` is what a program prints, or a formula. An HTML comment
``<!-- invisible-code-block: python`` holds code that a page needs and a reader does not.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from dist_adamw.cli import main
from tests.conftest import ROOT
from tests.docs.commands import ELSEWHERE, STATUS

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("launch/*.md"), *ROOT.glob("docs/**/*.md")]
)
_ANY_BLOCK = FencedCodeBlockLexer(language=r"[^\n]*")
_HIDDEN = DirectiveInHTMLCommentLexer(directive="invisible-code-block", arguments="python")


def read(page: str) -> Document:
    """Read a page; its examples are its blocks, in order."""
    return Document.parse(str(ROOT / page), _blocks)


def language(example: Example) -> str:
    """Return the first word after the fence; "" if there is none."""
    return _info(example).partition(" ")[0]


def _info(example: Example) -> str:
    return str(example.region.lexemes.get("language", "python")).strip()


def title(example: Example) -> str | None:
    """Return the file that a block is to be saved as."""
    found = re.fullmatch(r'\w+ title="([\w.]+)"', _info(example))
    return found[1] if found else None


def commands(example: Example) -> list[str]:
    """Return the commands of a ``sh`` block, without comments; a line that ends in a backslash continues."""
    lines = example.parsed.replace("\\\n", " ").splitlines()
    return [
        " ".join(words) for line in lines if (words := line.split(" #")[0].split()) and not words[0].startswith("#")
    ]


def run(example: Example) -> None:
    """Run a block, or do what its language allows."""
    kind = language(example)
    if name := title(example):
        Path(name).write_text(example.parsed)
    if kind == "python" and name:
        ast.parse(example.parsed)
    elif kind == "python":
        PythonEvaluator()(example)
    elif kind == "sh":
        for command in commands(example):
            if command not in ELSEWHERE:
                _run_command(command)
    elif kind == "json":
        json.loads(example.parsed)
    elif kind == "yaml":
        yaml.safe_load(example.parsed)
    elif kind != "text":
        raise ValueError(f"a block in {kind or 'no language'!r}: use python, sh, json, yaml or text.")


def _run_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program != "dist-adamw":
        raise ValueError(f"{command!r} is neither a dist-adamw command nor in tests/docs/commands.py")
    try:
        status = main(arguments)
    except SystemExit as end:  # --help
        status = int(end.code or 0)
    if status != STATUS.get(command, 0):
        raise AssertionError(f"{command!r} ended with {status}")


def _blocks(document: Document) -> Iterable[Region]:
    for lexer in (_ANY_BLOCK, _HIDDEN):
        for region in lexer(document):
            region.parsed = region.lexemes["source"]
            region.evaluator = run
            yield region


def page_folder(folder: Path) -> Path:
    """Make a folder in which the commands of a page find what they name."""
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder
