"""Hooks of MkDocs: files of the repository that are not in docs/ become pages of the site.

Links in README.md and docs/ are written for readers of the repository: relative to the file that has them. A file
outside of docs/ that is linked to becomes a page of the site: Markdown as it is, anything else as highlighted source. A
link to a folder becomes a code literal.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"  # also the site's first page
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".yaml": "yaml", ".toml": "toml", ".cfg": "ini"}
FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace ``folder/*`` in the navigation by the folder's pages."""
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(entries: Any, docs: Path) -> Any:
    if isinstance(entries, dict):
        return {title: _expanded(entry, docs) for title, entry in entries.items()}
    if not isinstance(entries, list):
        return entries
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and entry.endswith("/*"):
            expanded += sorted(path.relative_to(docs).as_posix() for path in docs.glob(f"{entry}.md"))
        else:
            expanded.append(_expanded(entry, docs))
    return expanded


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for README.md and for each file that a page links to, directly or through another."""
    waiting = [
        HOME,
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        *(f"docs/{file.src_uri}" for file in files.documentation_pages()),
    ]
    seen: set[str] = set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if not source.startswith("docs/"):
            files.append(_page_of(source, config))
        if source.endswith(".md"):
            waiting += _linked_files((ROOT / source).read_text(), source)
    return files


def _linked_files(markdown: str, source: str) -> list[str]:
    targets = []
    for part in FENCE.split(markdown)[::2]:
        for match in LINK.finditer(part):
            target = _in_repository(match[3], source)
            if target is not None and not target.startswith("docs/") and (ROOT / target).is_file():
                targets.append(target)
    return targets


def _page_of(source: str, config: MkDocsConfig) -> File:
    text = (ROOT / source).read_text()
    if not source.endswith(".md"):
        language = LANGUAGES.get(Path(source).suffix, "text")
        text = f"---\nsearch: {{exclude: true}}\n---\n# `{source}`\n\n````{language}\n{text}\n````\n"
    page = File.generated(config, _address(source), content=text)
    page.inclusion = page.inclusion.NOT_IN_NAV  # only a page of docs/ must be in the navigation
    return page


def _address(source: str) -> str:
    """Return the path in the site's docs of a file of the repository."""
    if source == HOME:
        return "index.md"
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return source if source.endswith(".md") else f"source/{source}.md"


def _in_repository(link: str, source: str) -> str | None:
    """Return the path in the repository that a link names, without anchor; None if it is no link to a file."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside of docs/ to their pages."""
    source = _source_of(page.file)
    if source.startswith("source/"):
        return markdown
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(_link_mender(source, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def _source_of(file: File) -> str:
    if file.generated_by is None:
        return f"docs/{file.src_uri}"
    return HOME if file.src_uri == "index.md" else file.src_uri


def _link_mender(source: str, address: str) -> Callable[[re.Match[str]], str]:
    def mended(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        target = _in_repository(link, source)
        if target is None:
            return match[0]
        anchor = link[len(link.partition("#")[0]) :]
        if (ROOT / target).is_dir():
            return f"`{target}/`" if text.strip("/`") in target else f"{text} (`{target}/`)"
        if not (ROOT / target).is_file():
            return match[0]  # MkDocs reports it
        relative = posixpath.relpath(_address(target), posixpath.dirname(address) or ".")
        return f"{image}[{text}]({relative}{anchor})"

    return mended
