"""docs/troubleshooting.md has every message that a user can see, each with a meaning, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.messages import ROOTS, Message, messages
from tests.docs.troubleshooting import PAGE, completed, listed, reworded, topic_of, without_meaning


def test_the_page_has_every_message_and_no_other() -> None:
    """If this fails: python -m tests.docs.troubleshooting, which prints what is left to write."""
    page, found = PAGE.read_text(), messages()
    texts = {message.text for message in found}
    assert sorted(texts - listed(page).keys()) == [], "messages that the page lacks"
    assert sorted(listed(page).keys() - texts) == [], "messages of the page that no code shows"
    assert completed(page, found) == page


def test_every_message_has_a_meaning() -> None:
    """If this fails: write it on the page, below the message: when it comes, why, and what to do."""
    assert without_meaning(PAGE.read_text()) == []


def test_every_module_with_messages_has_a_topic() -> None:
    page = PAGE.read_text()
    assert [message.module for message in messages() if topic_of(message.module, page) is None] == []


def test_the_words_of_every_raise_are_found() -> None:
    """Read the `raise` statements in another way than `messages` does, and compare the words."""
    known = _words(" ".join(f"{message.text} {message.rest}" for message in messages()))
    missing = [
        (path.name, node.lineno, text)
        for root in ROOTS
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and node.exc is not None
        for text in _first_words(node.exc)
        if _words(text) not in known
    ]
    assert missing == []


def _first_words(raised: ast.expr) -> list[str]:
    """Return the first literal of three words or more of what is raised, if there is one."""
    literals = [node.value for node in ast.walk(raised) if isinstance(node, ast.Constant)]
    return [text for text in literals if isinstance(text, str) and len(_words(text).split()) > 2][:1]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def test_messages_are_found_in_the_ways_that_code_writes_them(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "HINT = 'pass {} to prepare.'\n"
        "def f(x):\n"
        "    warnings.warn('a warning: ' f'{x} x {x}.', stacklevel=2)\n"
        "    raise ValueError(f'{x} is wrong. Do this.')\n"
        "def g(x):\n"
        "    raise CheckpointError(HINT.format(x))\n"
        "def h(x):\n"
        "    return f'the number {x} is too large for this.'\n"
        "def i(x):\n"
        "    raise AssertionError('not for users')\n"
        "def j(x):\n"
        "    'A docstring is no message.'\n"
        "    raise FileError([problem((), f'the key {x} is unknown')])\n"
        "TABLE = {'a': ('b', 'replaces the scheduler. Leave it out')}\n"
        "def k(x):\n"
        "    problems.append(f'{x}. The ranks have other values. Stop.')\n"
        "    print(f'k.py: {x} is lost', file=sys.stderr)\n"
        "    print('the answer of a command')\n"
    )
    assert {(message.text, message.rest) for message in messages({tmp_path: ""})} == {
        ("a warning: …", ""),
        ("… is wrong", "Do this."),
        ("pass … to prepare", ""),
        ("the number … is too large for this", ""),
        ("the key … is unknown", ""),
        ("replaces the scheduler", "Leave it out"),
        ("…. The ranks have other values", "Stop."),
        ("k.py: … is lost", ""),
    }


def test_meanings_stay_and_a_new_message_has_none() -> None:
    page = "<!-- messages: a/ -->\n\n#### `old`\n\nGone.\n\n#### `kept: … has it`\n\nBy hand.\n\n<!-- end -->"
    found = [Message("kept: … has it now", "a/b.py", ""), Message("new", "a/c.py", "Do this.")]
    new = completed(page, found)
    assert new == "<!-- messages: a/ -->\n\n#### `kept: … has it now`\n\nBy hand.\n\n#### `new`\n\n<!-- end -->"
    assert without_meaning(new) == ["new"]
    assert reworded({"old", "kept: … has it"}, {"kept: … has it now", "new"}) == {
        "kept: … has it now": "kept: … has it"
    }
