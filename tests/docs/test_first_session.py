"""docs/first_session.md, typed: two ranks, Ctrl-C, three ranks, export."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.first_session import BLOCK, PAGE, replay


@pytest.mark.timeout(400)  # seventeen commands, each in a process, on a slow machine
def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    """In this environment: the commands that make one are left out."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",  # without it DeepSpeed, which the page's environment has not, prints a warning
    }
    page = PAGE.read_text()
    assert _outputs(replay(page, tmp_path, environment, install=False)) == _outputs(page)


def _outputs(page: str) -> list[str]:
    """Return what each command printed, without dates and sizes; of training, where Ctrl-C may be late, its end."""
    outputs = [block["text"] for block in BLOCK.finditer(page) if block[1] == "text"]
    lasting = [re.sub(r", \w{3} \w{3} +\d+ [\d:]+ \d{4}|[\d,]+ bytes", "", text) for text in outputs]
    return [text.splitlines()[-1] if text.startswith(("sample", "continues")) else text for text in lasting]
