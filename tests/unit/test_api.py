"""The public names and their arguments change on purpose only."""

from __future__ import annotations

from pathlib import Path

from tests.api import describe_api


def test_the_public_api_is_as_recorded() -> None:
    recorded = (Path(__file__).parents[1] / "api.txt").read_text().splitlines()
    assert describe_api() == recorded, "record it with: python -m tests.api > tests/api.txt"
