"""The messages that a user can see, taken from the source: errors, warnings, findings and mistakes in an option.

A message is what a statement shows (`raise`, `warn`, `sys.exit`), and each whole sentence elsewhere in the code, which
a function returns, joins or collects for another one to raise. A value in a message is written as "…". Only the first
sentence stands for a message.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from tests.conftest import ROOT

VALUE = "…"
# The folders with code of which users see messages, and what stands before the paths of their modules.
ROOTS = {ROOT / "dist_adamw": "", ROOT / "launch": "launch/"}
# Not for users: an interface that a subclass must complete, and what Python's own protocols ask for.
_INTERNAL = {"NotImplementedError", "StopIteration", "KeyError", "IndexError", "AssertionError"}
# Calls, other than of an exception, that show their first argument.
_SHOWING = {"warn", "exit", "_refuse"}
# Sentences that are help, a part of an answer, or the end of a message, by their first words.
_NO_MESSAGES = (
    "Activations",
    "Did you mean",
    "If you trust it, load it with torch",
    "Indent its keys",
    "Leave it out for",
    "Parameters without weight decay",
    "Pass the file for accelerate",
    "Print ",
    "Samples of ",
    "The newest whole one",
    "The schema of",
    "There is no other whole",
    "one of them",
    "Train ",
    "dist-adamw VERB",
)


@dataclass(frozen=True)
class Message:
    """The first sentence of a message, the path of its module, and the sentences that follow."""

    text: str
    module: str
    rest: str = field(compare=False)


def messages(roots: Mapping[Path, str] = ROOTS) -> list[Message]:
    """Return every message of the modules in some folders, in the order of the modules."""
    found: dict[Message, None] = {}
    for root, prefix in roots.items():
        for path in sorted(root.rglob("*.py")):
            tree = ast.parse(path.read_text())
            constants = _constants(tree)
            for node in _shown_in(tree, constants):
                text, rest = split_sentence(_text(node, constants))
                if re.search(r"[A-Za-z]{2}", text) and not text.startswith(_NO_MESSAGES):
                    found[Message(text, prefix + path.relative_to(root).as_posix(), rest)] = None
    return list(found)


def split_sentence(text: str) -> tuple[str, str]:
    """Return the first sentence that has words, on one line, with values in a row as one; and the rest."""
    text = re.sub(rf"{VALUE}(?:[ ,x*.]*{VALUE})+", VALUE, " ".join(text.split()))
    for end in re.finditer(r"[.?!](?= [A-Z(]|$)|:(?= [A-Z(][a-z]|$)", text):
        if re.search(r"[A-Za-z]{2}", text[: end.start()]):
            return text[: end.start()].strip(), text[end.end() :].strip()
    return text.strip(), ""


def _shown_in(node: ast.AST, constants: Mapping[str, ast.expr], *, is_shown: bool = False) -> Iterator[ast.expr]:
    """Yield the texts below a node that a statement shows to a user, and whole sentences."""
    is_shown |= _shows(node)
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.Expr) and isinstance(child, ast.Constant):  # a docstring
            continue
        if not _is_text(child, constants):
            yield from _shown_in(child, constants, is_shown=is_shown)
            continue
        is_whole = isinstance(node, ast.Call) and node.args[:1] == [child] and _shows(node)
        if is_whole or _is_sentence(_text(child, constants), is_shown=is_shown):
            yield child


def _shows(node: ast.AST) -> bool:
    """Return whether the texts in a node are for the user."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return _name(node.exc) not in _INTERNAL
    if isinstance(node, ast.Call):
        name = _name(node)
        to_stderr = any(ast.unparse(keyword) == "file=sys.stderr" for keyword in node.keywords)
        return name in _SHOWING or to_stderr or (name.endswith("Error") and name not in _INTERNAL)
    return False


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _is_sentence(text: str, *, is_shown: bool) -> bool:
    words = [word for word in text.split() if re.search(r"[A-Za-z]{2}", word)]
    if is_shown:
        return len(words) > 2
    return len(words) > 3 and re.search(r"\.$|[\w)]\. [A-Z]", text) is not None


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _is_text(node: ast.AST, constants: Mapping[str, ast.expr]) -> TypeGuard[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left, constants) or _is_text(node.right, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _is_text(node.func.value, constants)
    if isinstance(node, ast.Name):
        return isinstance(node.ctx, ast.Load) and isinstance(constants.get(node.id), ast.Constant | ast.JoinedStr)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """Return an expression's text, with "…" for what is not literal."""
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


def _is_literal(node: ast.expr, constants: Mapping[str, ast.expr]) -> bool:
    return isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant)
