"""The errors that users catch. Knows nothing else of the package."""

from __future__ import annotations


class AgreementError(RuntimeError):
    """Ranks that must be in the same state are not. Raised on every rank alike."""


def printable(text: str) -> str:
    """Return ``text`` on one line, whatever a file of another program has in it. Local."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used. The message names it, what is wrong, and what to do."""

    def __init__(self, message: str) -> None:
        # What a damaged file says may be part of it: of any length, over several lines, not to be printed.
        line = printable(message)
        super().__init__(line if len(line) <= 3000 else f"{line[:2000]} ... {line[-900:]}")
