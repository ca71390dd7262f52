"""Draws the pictures of the docs: ``make screenshots``, after ``make repro``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.browser.conftest import CHROMIUM

REPORT, IMAGES = Path("reports/profiler.html"), Path("docs/images")
MOST = 300_000
"""Bytes of a picture."""


def pictures(browser: Browser, report: Path) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of: the first screen, the graph, the panel of the worst op, and that in dark."""
    for scheme, names in (("light", ("report", "graph", "detail")), ("dark", ("", "", "detail-dark"))):
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(report.resolve().as_uri())
        steps = (
            "scrollTo(0, 0)",
            "document.getElementById('graph').scrollIntoView()",
            "document.querySelector('#worst a').click()",
        )
        for name, step in zip(names, steps, strict=True):
            page.evaluate(step)
            if name:
                yield name, page.screenshot()
        page.close()


def main() -> None:
    if CHROMIUM is None or not REPORT.is_file():
        sys.exit(f"{REPORT} is missing, run make repro" if CHROMIUM else "chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, png in pictures(browser, REPORT):
            path = IMAGES / f"{name}.png"
            path.write_bytes(png)
            if path.stat().st_size > MOST:
                sys.exit(f"{path} has {path.stat().st_size} bytes, more than {MOST}")
        browser.close()


if __name__ == "__main__":
    main()
