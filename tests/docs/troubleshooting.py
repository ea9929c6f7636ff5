"""Keep docs/troubleshooting.md complete: `python -m tests.docs.troubleshooting` adds new messages, removes old ones.

The page has topics. A topic has text, and between two comments the messages of the modules that the first comment
names. What stands after a message is kept; for a new message it is the rest of the message, which says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.conftest import ROOT
from tests.docs.messages import Message, messages

PAGE = ROOT / "docs/troubleshooting.md"
TOPIC = re.compile(r"<!-- messages: (?P<modules>[^>]+) -->\n(?P<items>.*?)<!-- end -->", re.DOTALL)
ITEM = re.compile(r"^- (?P<ticks>`+) ?(?P<message>.*?) ?(?P=ticks)\.(?: (?P<meaning>.*))?$", re.MULTILINE)


def listed(page: str) -> dict[str, str]:
    """Return the page's messages, with what is written after them."""
    return {match["message"]: match["meaning"] or "" for match in ITEM.finditer(page)}


def topic_of(module: str, page: str) -> str | None:
    """Return the topic of a module, as its comment names it: the longest path that the module begins with wins."""
    fitting = [
        (len(prefix), match["modules"])
        for match in TOPIC.finditer(page)
        for prefix in match["modules"].split()
        if module.startswith(prefix)
    ]
    return max(fitting)[1] if fitting else None


def completed(page: str, found: Iterable[Message]) -> str:
    """Return the page with exactly the messages ``found``."""
    of_topic: dict[str | None, dict[str, str]] = {}
    for message in found:
        of_topic.setdefault(topic_of(message.module, page), {}).setdefault(message.text, _escaped(message.rest))

    def filled(match: re.Match[str]) -> str:
        written = listed(match["items"])
        items = sorted(of_topic.get(match["modules"], {}).items(), key=lambda item: item[0].strip("… ").lower())
        lines = [_item(message, written.get(message) or rest) for message, rest in items]
        return f"<!-- messages: {match['modules']} -->\n\n" + "".join(lines) + "\n<!-- end -->"

    return TOPIC.sub(filled, page)


def _item(message: str, meaning: str) -> str:
    quoted = f"`` {message} ``" if "`" in message else f"`{message}`"
    return f"- {quoted}." + (f" {meaning}" if meaning else "") + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"([<*_\[\]])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(completed(PAGE.read_text(), messages()))
