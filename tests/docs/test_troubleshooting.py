"""docs/troubleshooting.md has every message that the package can show, and no other."""

from __future__ import annotations

from pathlib import Path

from tests.docs.messages import messages
from tests.docs.troubleshooting import PAGE, completed, listed, topic_of


def test_the_page_has_every_message_and_no_other() -> None:
    """If this fails: python -m tests.docs.troubleshooting."""
    page, found = PAGE.read_text(), messages()
    assert set(listed(page)) == {message.text for message in found}
    assert completed(page, found) == page


def test_every_module_with_messages_has_a_topic() -> None:
    page = PAGE.read_text()
    assert [message.module for message in messages() if topic_of(message.module, page) is None] == []


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
    )
    assert {(message.text, message.rest) for message in messages(tmp_path)} == {
        ("a warning: …", ""),
        ("… is wrong", "Do this."),
        ("pass … to prepare", ""),
        ("the number … is too large for this", ""),
    }


def test_what_is_written_after_a_message_stays() -> None:
    page = "<!-- messages: a/ -->\n- `old`.\n- `kept`. By hand.\n<!-- end -->"
    from tests.docs.messages import Message

    found = [Message("kept", "a/b.py", "From the source."), Message("new", "a/c.py", "Do this.")]
    assert completed(page, found) == "<!-- messages: a/ -->\n\n- `kept`. By hand.\n- `new`. Do this.\n\n<!-- end -->"
