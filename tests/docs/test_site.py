"""The site: a strict build, and an API reference that has everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import dist_adamw
from tests.conftest import ROOT


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> str:
    """Build the site into ``folder``; return what went wrong, "" for nothing."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    return done.stderr if done.returncode else ""


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    assert build(tmp_path) == ""
    for page in ("index", "schedule", "api/training", "CHANGELOG"):
        assert (tmp_path / f"{page}.html").is_file()


def test_the_reference_has_every_public_name_once() -> None:
    named = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^::: dist_adamw\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == sorted(set(dist_adamw.__all__) - {"__version__"})
