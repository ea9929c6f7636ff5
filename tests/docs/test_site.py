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
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.stderr if done.returncode else ""


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    assert build(tmp_path) == ""
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {f"{page}.html" for page in ("index", "schedule", "api/training", "CHANGELOG")} <= set(pages)
    # Nothing is loaded from elsewhere, and pages opened from the disk have the search, too.
    elsewhere = re.compile(r"<(?:script|img|link rel=.stylesheet.)[^>]* (?:src|href)=.https?:")
    assert not [page for page, text in pages.items() if elsewhere.search(text)]
    assert (tmp_path / "search/search_index.js").is_file()
    # A link has a title, not the path of a file; a page named README is no section's first page.
    assert '<a href="install.html">Installation</a>' in pages["index.html"]
    assert '<a href="command.html#pictures">Pictures</a>' in pages["schedule.html"]
    assert 'href="schedule.html"' in re.sub(r"<nav.*?</nav>", "", pages["schedule_pictures.html"], flags=re.DOTALL)
    navigation = set(re.findall(r'href="([^"]+)" class="md-nav__link"', pages["index.html"]))
    assert {"launch.html", "examples.html"} <= navigation


def test_the_reference_has_every_public_name_once() -> None:
    named = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^::: dist_adamw\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == sorted(set(dist_adamw.__all__) - {"__version__"})
