"""Keep docs/troubleshooting.md complete: `python -m tests.docs.troubleshooting` adds new messages, removes old ones.

The page has topics. A topic has text, and between two comments the messages of the modules that the first comment
names. A message is a heading, so that the site's search finds it; the paragraph below is its meaning, and is written by
hand. A new message has none, and a test fails until it has. A message that was reworded a little keeps its meaning; the
command prints both, and what it removed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from tests.conftest import ROOT
from tests.docs.messages import Message, messages

PAGE = ROOT / "docs/troubleshooting.md"
TOPIC = re.compile(r"<!-- messages: (?P<modules>[^>]+) -->\n(?P<items>.*?)<!-- end -->", re.DOTALL)
ITEM = re.compile(r"^#### (?P<ticks>`+) ?(?P<message>.*?) ?(?P=ticks)\n\n(?:(?P<meaning>[^#<\n].*)\n)?", re.MULTILINE)
_ALIKE = 0.75  # the least ratio of difflib for two wordings of one message


def listed(page: str) -> dict[str, str]:
    """Return the page's messages, with their meanings."""
    found: dict[str, str] = {}
    for match in ITEM.finditer(page):
        found[match["message"]] = match["meaning"] or found.get(match["message"], "")
    return found


def topic_of(module: str, page: str) -> str | None:
    """Return the topic of a module, as its comment names it: the longest path that the module begins with wins."""
    fitting = [
        (len(prefix), match["modules"])
        for match in TOPIC.finditer(page)
        for prefix in match["modules"].split()
        if module.startswith(prefix)
    ]
    return max(fitting)[1] if fitting else None


def without_meaning(page: str) -> list[str]:
    """Return the messages below which nothing is written."""
    return [match["message"] for match in ITEM.finditer(page) if not match["meaning"]]


def completed(page: str, found: Iterable[Message]) -> str:
    """Return the page with exactly the messages ``found``."""
    of_topic: dict[str | None, set[str]] = {}
    for message in found:
        of_topic.setdefault(topic_of(message.module, page), set()).add(message.text)
    everywhere = listed(page)
    new = set().union(*of_topic.values()) - everywhere.keys()
    renamed = reworded(everywhere.keys() - set().union(*of_topic.values()), new)

    def filled(match: re.Match[str]) -> str:
        here = listed(match["items"])
        items = sorted(of_topic.get(match["modules"], ()), key=lambda text: (text.strip("… ").lower(), text))
        lines = []
        for text in items:
            before = renamed.get(text, text)
            lines.append(_item(text, here.get(before) or everywhere.get(before, "")))
        return f"<!-- messages: {match['modules']} -->\n\n" + "".join(lines) + "<!-- end -->"

    return TOPIC.sub(filled, page)


def reworded(removed: Iterable[str], added: Iterable[str]) -> dict[str, str]:
    """Return the earlier wording of each new message that resembles one that was removed."""
    left = sorted(removed)
    found = {}
    for text in sorted(added):
        if near := difflib.get_close_matches(text, left, n=1, cutoff=_ALIKE):
            found[text] = near[0]
            left.remove(near[0])
    return found


def _item(message: str, meaning: str) -> str:
    quoted = f"`` {message} ``" if "`" in message else f"`{message}`"
    return f"#### {quoted}\n\n" + (f"{meaning}\n\n" if meaning else "")


def main() -> None:
    """Complete the page, and print what is left to be done by hand."""
    old = PAGE.read_text()
    new = completed(old, messages())
    PAGE.write_text(new)
    removed, added = listed(old).keys() - listed(new).keys(), listed(new).keys() - listed(old).keys()
    for text, before in (pairs := reworded(removed, added)).items():
        print(f"reworded, check its meaning: {before}\n                         now: {text}")
    for text in sorted(removed - set(pairs.values())):
        print(f"removed: {text}\n  its meaning was: {listed(old)[text]}")
    for text in without_meaning(new):
        print(f"write a meaning: {text}")


if __name__ == "__main__":
    main()
