"""Exception types that users catch."""

from __future__ import annotations


class AgreementError(RuntimeError):
    """Ranks that must be in the same state are not. Raised on every rank."""


def printable(text: str) -> str:
    """Return ``text`` on one line, with unprintable characters escaped. Local."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used. The message names the checkpoint, the problem and the remedy."""

    def __init__(self, message: str) -> None:
        # The message may quote a damaged file: text of any length, with line breaks and control characters.
        line = printable(message)
        super().__init__(line if len(line) <= 3000 else f"{line[:2000]} ... {line[-900:]}")
