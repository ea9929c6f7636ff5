"""Hooks of MkDocs: files of the repository that are not in docs/ become pages of the site.

Links in README.md and docs/ are written for readers of the repository: relative to the file that has them. A file
outside of docs/ that is linked to becomes a page of the site: Markdown as it is, anything else as highlighted source. A
link to a folder becomes a code literal. A link whose text is a path, as in `[docs/install.md](docs/install.md)`, gets
the title of what it leads to. A picture is a link to itself, to be seen at its full size.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"  # also the site's first page
FOR_DEVELOPERS = ("docs/adr/", "CHANGELOG", "CONTRIBUTING", "docs/design", "docs/style", "docs/release", "benchmarks/")
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".yaml": "yaml", ".toml": "toml", ".cfg": "ini"}
FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+?)[ ]*$", re.MULTILINE)
PICTURE = re.compile(r'<img alt="[^"]*" src="([^":]+)"[^>]*>')
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
    if source.endswith("/README.md"):  # by the name README it would be the first page of its section
        return f"{posixpath.dirname(source)}.md"
    return source if source.endswith(".md") else f"source/{source}.md"


def _in_repository(link: str, source: str) -> str | None:
    """Return the path in the repository that a link names, without anchor; None if it is no link to a file."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside of docs/ to their pages; put pages for developers last in the search."""
    source = _source_of(page.file)
    if source.startswith(FOR_DEVELOPERS):
        page.meta["search"] = {"boost": 0.1}
    if source.startswith("source/"):
        return markdown
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(_link_mender(source, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def _source_of(file: File) -> str:
    if file.generated_by is None:
        return f"docs/{file.src_uri}"
    if file.src_uri == "index.md":
        return HOME
    folder = file.src_uri.removesuffix(".md")
    return f"{folder}/README.md" if (ROOT / folder / "README.md").is_file() else file.src_uri


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
        if text == link.partition("#")[0] and text.endswith(".md"):
            text = _title(ROOT / target, anchor[1:])
        relative = posixpath.relpath(_address(target), posixpath.dirname(address) or ".")
        return f"{image}[{text}]({relative}{anchor})"

    return mended


def _title(path: Path, anchor: str) -> str:
    """Return the heading that a link leads to."""
    parts = FENCE.split(path.read_text())[::2]
    headings: list[str] = [heading for part in parts for heading in HEADING.findall(part)]
    return next((heading for heading in headings if slugify(heading, "-") == anchor), headings[0])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make every picture a link to itself; point a notebook's links to pages of the site."""
    if page.file.src_uri.endswith(".ipynb"):
        return re.sub(r'href="([^":#]+)\.md(#[^"]*)?"', r'href="\1.html\2"', html)
    return PICTURE.sub(r'<a href="\1">\g<0></a>', html)
