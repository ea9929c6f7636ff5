"""Open every page of the built site in Chromium: `python -m tests.docs.browser`, after `make docs` (docs/release.md).

Each page at two widths: what fails to load, errors in the console, elements wider than the window, broken links and anchors,
headings that skip a level, text too small to read. Prints a line for each, and ends with 1 if there is any. Whether pages look
right is for a person to see: `--pictures FOLDER` takes a screenshot of each, and one in the dark scheme if it has pictures.

It needs a browser and playwright (`pip install playwright`, in an environment of its own), so it is not in the suite.
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

from playwright.sync_api import sync_playwright

SITE = Path(__file__).resolve().parents[2] / "site"
WIDTHS = {1280: 800, 390: 844}  # a laptop, a phone
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
# Faults of one page in one window. A box that scrolls may have wide contents: those do not widen the page.
FAULTS = """smallest => {
    const faults = [], name = e => `<${e.tagName.toLowerCase()} class="${e.className}"> ${e.textContent.trim().slice(0, 60)}`;
    const seen = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
    const article = document.querySelector("article") || document.body, width = document.documentElement.clientWidth;
    const scrolls = e => e && e !== document.body && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
    if (document.scrollingElement.scrollWidth > width) faults.push(`is ${document.scrollingElement.scrollWidth} px wide`);
    for (const e of article.querySelectorAll("*"))
        if (seen(e) && e.getBoundingClientRect().right > width + 1 && !scrolls(e)) faults.push(`sticks out: ${name(e)}`);
    for (const e of document.images) if (e.complete && !e.naturalWidth) faults.push(`picture: ${e.src}`);
    let level = 0;
    for (const e of article.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
        if (+e.tagName[1] > level + 1) faults.push(`heading skips a level: ${name(e)}`);
        level = +e.tagName[1];
    }
    const words = document.createTreeWalker(article, NodeFilter.SHOW_TEXT), small = new Map();
    while (words.nextNode()) {
        const e = words.currentNode.parentElement, size = parseFloat(getComputedStyle(e).fontSize);
        if (words.currentNode.data.trim() && seen(e) && size < smallest) small.set(size, (small.get(size) || []).concat(name(e)));
    }
    for (const [size, all] of small) faults.push(`text of ${size.toFixed(1)} px, ${all.length} times: ${all[0]}`);
    return faults;
}"""
LINKS = "() => [...document.links].map(a => a.href)"
ANCHORS = "() => [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(folder: Path) -> str:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def faults_of(page: Any, address: str, smallest: float) -> Iterator[str]:
    """Load a page; yield what is wrong with it."""
    events: list[str] = []
    watch = {
        "console": lambda message: events.append(f"console: {message.text}") if message.type == "error" else None,
        "pageerror": lambda error: events.append(f"script: {error}"),
        "requestfailed": lambda request: events.append(f"request: {request.url} {request.failure}"),
        "response": lambda answer: events.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None,
    }
    for event, listener in watch.items():
        page.on(event, listener)
    page.goto(address, wait_until="load")
    page.wait_for_function("() => [...document.images].every(i => i.complete)")
    yield from [*events, *page.evaluate(FAULTS, smallest)]
    for event, listener in watch.items():
        page.remove_listener(event, listener)


def take_pictures(page: Any, path: Path) -> None:
    page.screenshot(path=f"{path}.png", full_page=True)
    if page.locator("article img").count():
        page.emulate_media(color_scheme="dark")
        page.reload()
        page.screenshot(path=f"{path}-dark.png", full_page=True)
        page.emulate_media(color_scheme="light")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("pages", nargs="*", help="for example concepts.html; all by default")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--pictures", type=Path, help="a folder for a screenshot of each page, width and scheme")
    parser.add_argument("--smallest", type=float, default=12, help="of text, in px")
    options = parser.parse_args()
    pages = options.pages or sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    root, found, anchors, links = serve(SITE), 0, {}, {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=ARGUMENTS)
        for width, height in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            for name in pages:
                for fault in faults_of(page, root + name, options.smallest):
                    found += 1
                    print(f"{name}, {width} px: {fault}", flush=True)
                anchors[root + name] = {"", *page.evaluate(ANCHORS)}
                links[name] = {urldefrag(link) for link in page.evaluate(LINKS) if link.startswith(root)}
                if options.pictures:
                    take_pictures(page, options.pictures / f"{name.replace('/', '-')}-{width}")
            page.close()
        browser.close()
    for name in pages if not options.pages else []:
        for address, anchor in sorted(links[name]):
            target = address + "index.html" if address.endswith("/") else address
            if (target in anchors and anchor not in anchors[target]) or not (SITE / target.removeprefix(root)).is_file():
                found += 1
                print(f"{name}: broken link {address}#{anchor}")
    print(f"{len(pages)} pages: {found} faults" if found else f"{len(pages)} pages: no faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
