"""The pictures of concepts.md: the script draws the files that the page shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_the_script_draws_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    drawn = {path.name for path in pictures.main(tmp_path)}
    shown = re.findall(r"\]\(pictures/([\w.]+)\)", (ROOT / "docs/concepts.md").read_text())
    assert drawn == set(shown) == {path.name for path in (ROOT / "docs/pictures").iterdir()}
    sys.modules.pop("pictures")
