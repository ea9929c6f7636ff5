"""The messages that the package can show a user, taken from its source: errors that it raises, and warnings.

A value in a message is written as "…". Only the first sentence stands for a message: what to do follows in the message
itself, and the page of messages says what it means.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT

VALUE = "…"
PACKAGE = ROOT / "dist_adamw"
# Not for users: an interface that a subclass must complete, and what Python's own protocols ask for.
_INTERNAL = {"NotImplementedError", "StopIteration", "KeyError", "IndexError", "AssertionError"}
# Sentences that are help or a part of an answer, by their first words.
_NO_MESSAGES = ("Activations", "Parameters without weight decay", "Print one JSON", "The schema of", "Leave it out for")


@dataclass(frozen=True)
class Message:
    """The first sentence of a message, the path in the package of its module, and the sentences that follow."""

    text: str
    module: str
    rest: str = field(compare=False)


def messages(package: Path = PACKAGE) -> list[Message]:
    """Return every message of the package's modules, in the order of the modules."""
    found: dict[Message, None] = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = _constants(tree)
        for node in ast.walk(tree):
            for argument in _shown_by(node):
                text, rest = split_sentence(_text(argument, constants))
                if text.strip(f"{VALUE} .:") and not text.startswith(_NO_MESSAGES):
                    found[Message(text, path.relative_to(package).as_posix(), rest)] = None
    return list(found)


def split_sentence(text: str) -> tuple[str, str]:
    """Return the first sentence, on one line, with values in a row as one; and the rest."""
    text = re.sub(rf"{VALUE}(?:[ ,x*.]*{VALUE})+", VALUE, " ".join(text.split()))
    ended = re.search(r"[.?!:](?= [A-Z(]|$)", text)
    return (text[: ended.start()].strip(), text[ended.end() :].strip()) if ended else (text.strip(), "")


def _shown_by(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that a statement shows to a user."""
    if isinstance(node, ast.Call) and node.args:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "warn" or (name.endswith("Error") and name not in _INTERNAL):
            yield node.args[0]
    elif isinstance(node, ast.Assign | ast.Return) and node.value is not None:
        values = node.value.values if isinstance(node.value, ast.Dict) else [node.value]
        yield from (value for value in values if _is_sentence(value))


def _is_sentence(node: ast.expr) -> bool:
    """Return whether an expression is a sentence that a function raises for another one."""
    if not isinstance(node, ast.Constant | ast.JoinedStr):
        return False
    text = _text(node, {})
    return len(text.split()) > 5 and text.endswith(".")


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """Return an expression's text, with "…" for what is not literal."""
    if isinstance(node, ast.Constant) and node.value is None:
        return ""
    if isinstance(node, ast.Constant):
        return re.sub(r"(?<!=)\{\w*\}", VALUE, str(node.value))  # filled in by str.format
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants) if _is_literal(node.value, constants) else VALUE
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return _text(constants[node.id], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{[^{}]*\}", VALUE, _text(node.func.value, constants))
    return VALUE


def _is_literal(node: ast.expr, constants: dict[str, ast.expr]) -> bool:
    return isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant)
