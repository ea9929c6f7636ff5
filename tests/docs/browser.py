"""Open every page of the built site in Chromium: `python -m tests.docs.browser`, after `make docs` (docs/release.md).

Each page at two widths: what fails to load, errors in the console, elements wider than the window, broken links and
anchors, headings that skip a level, text too small to read; and a search without results. Ends with 1 if there is any.
Whether pages look right is for a person to see: `--pictures FOLDER` takes a screenshot of each, and a dark one if it
has pictures.

It needs a browser and playwright, so it is not in the suite.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from playwright.sync_api import Error, sync_playwright

SITE = Path(__file__).resolve().parents[2] / "site"
WIDTHS = {1280: 800, 390: 844}  # a laptop, a phone
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FAULTS = Path(__file__).with_name("page_faults.js").read_text()
LINKS = "() => [...document.links].map(a => a.href)"
ANCHORS = "() => [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(folder: Path) -> str:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def watch(page: Any, events: list[str]) -> None:
    """Add what fails on any page that ``page`` loads."""
    page.on("console", lambda message: events.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: events.append(f"script: {error}"))
    page.on("requestfailed", lambda request: events.append(f"request: {request.url} {request.failure}"))
    page.on(
        "response", lambda answer: events.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None
    )


def search(page: Any, address: str) -> Iterator[str]:
    """Type a word, as a reader would."""
    page.goto(address)
    page.locator(".md-search__input").click()
    page.keyboard.type("checkpoint", delay=50)
    try:
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
    except Error:
        yield f"search finds nothing from {address}"


def take_pictures(page: Any, path: str) -> None:
    page.screenshot(path=f"{path}.png", full_page=True)
    if page.locator("article img").count():
        for scheme in ("dark", "light"):
            page.evaluate("() => localStorage.clear()")  # the scheme of the first page
            page.emulate_media(color_scheme=scheme)
            page.reload()
            if scheme == "dark":
                page.screenshot(path=f"{path}-dark.png", full_page=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("pages", nargs="*", help="for example concepts.html; all by default")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    parser.add_argument("--smallest", type=float, default=12, help="text, in px")
    options = parser.parse_args()
    pages = options.pages or sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    root, faults, anchors, links = serve(SITE), list[str](), dict[str, set[str]](), dict[str, set[Any]]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=ARGUMENTS)
        for width, height in WIDTHS.items():
            page, events = browser.new_page(viewport={"width": width, "height": height}), list[str]()
            watch(page, events)
            for name in pages:
                page.goto(root + name)
                page.wait_for_function("() => [...document.images].every(i => i.complete)")
                faults += [f"{name}, {width} px: {fault}" for fault in page.evaluate(FAULTS, options.smallest)]
                anchors[root + name] = {"", *page.evaluate(ANCHORS)}
                links[name] = {urldefrag(link) for link in page.evaluate(LINKS) if link.startswith(root)}
                if options.pictures:
                    take_pictures(page, f"{options.pictures}/{name.replace('/', '-')}-{width}")
            faults += [f"{width} px: {event}" for event in events]
            page.close()
        for start in (root, f"{SITE.as_uri()}/"):
            faults += search(browser.new_page(), start + "index.html")
        browser.close()
    for name in pages:
        for address, anchor in sorted(links[name]):
            target = address + "index.html" if address.endswith("/") else address
            missing = target in anchors and anchor not in anchors[target]
            if missing or not (SITE / target.removeprefix(root)).is_file():
                faults.append(f"{name}: broken link {address}#{anchor}")
    print("\n".join([*faults, f"{len(pages)} pages, {len(faults)} faults"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
