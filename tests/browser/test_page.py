"""The page as a whole: keys, schemes, narrow screens, paper."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open


def tab_to(page: Page, selector: str, most: int = 200) -> None:
    """Press Tab until the focus is there."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"{most} times Tab do not lead to {selector}")


def test_everything_is_reached_with_keys(opened: Open) -> None:
    page = opened()
    tab_to(page, "details.finding summary")
    tab_to(page, "[data-zoom=in]")
    tab_to(page, ".canvas")
    page.keyboard.press("ArrowRight")
    tab_to(page, "a[data-op='down#1']")
    page.keyboard.press("Enter")
    expect(page.locator("#detail h2")).to_have_text("down (call 2)")
    tab_to(page, "#detail .close", 3)
    tab_to(page, "#detail input.log")
    page.keyboard.press("Space")
    assert page.locator("#detail input.log").first.is_checked()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.op") == "down#1"
    tab_to(page, "input[data-table=t-FvsQ]")
    page.keyboard.type("head")
    assert page.locator("#t-FvsQ tbody tr:visible").count() == 3
    tab_to(page, "#t-FvsQ thead button")
    page.keyboard.press("Enter")
    assert page.locator("#t-FvsQ th").first.get_attribute("aria-sort") == "descending"


def test_the_graph_can_be_skipped(opened: Open) -> None:
    page = opened(page="deep")
    tab_to(page, ".skip")
    page.keyboard.press("Enter")
    expect(page.locator("#FvsQ h2")).to_be_in_viewport()
    tab_to(page, "input[data-table=t-FvsQ]", 1)


@pytest.mark.parametrize(
    "selector", ["nav a", "summary", "[data-zoom=in]", ".canvas", "#t-FvsQ thead button", "#t-FvsQ a"]
)
def test_the_focus_is_seen(opened: Open, selector: str) -> None:
    page = opened()
    tab_to(page, selector)
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_focus_is_seen_in_the_graph(opened: Open) -> None:
    page = opened()
    tab_to(page, ".canvas a")
    width = "parseFloat(getComputedStyle(document.activeElement.querySelector('rect:last-of-type')).strokeWidth)"
    assert page.evaluate(width) >= 3


def test_a_dark_scheme_is_followed(opened: Open) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(color_scheme="light").evaluate(colour), opened(color_scheme="dark").evaluate(colour)
    assert light != dark
    assert sum(map(int, dark[4:-1].split(","))) < 3 * 60


@pytest.mark.parametrize("address", ["", "#op=down%231", "#QAT008-down-(call-2)"])
@pytest.mark.parametrize("width", [390, 800])
def test_nothing_hangs_over_on_narrow_screens(opened: Open, width: int, address: str) -> None:
    page = opened(address, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_shows_all_findings_and_all_of_the_graph(opened: Open, scheme: str) -> None:
    page = opened("#op=stem", page="small", color_scheme=scheme)
    page.locator("[data-zoom=in]").evaluate("button => button.click()")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    findings = page.locator("details.finding dl")
    assert findings.count() == 5
    assert all(findings.nth(i).is_visible() for i in range(5))
    whole = page.evaluate("Object.values(view.whole)")
    assert list(map(float, (page.locator("svg.graph").first.get_attribute("viewBox") or "").split())) == whole
    assert page.locator("#detail").is_hidden()
    assert page.locator("[data-zoom=in]").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert sum(map(int, ink[4:-1].split(","))) < 3 * 60, "dark on white, whatever the screen has"
    assert page.pdf().startswith(b"%PDF")
