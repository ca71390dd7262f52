"""The graph: moving about in it, its colours, shared modules and composites."""

from __future__ import annotations

import math
import re

import pytest
from playwright.sync_api import Page, expect

from qatlib.analysis.report import ReportData
from tests.browser.conftest import Open

CANVAS = ".canvas:visible"


def view(page: Page) -> tuple[float, float, float, float]:
    """Left, top, width and height of what is seen."""
    x, y, w, h = map(float, (page.locator(f"{CANVAS} svg.graph").get_attribute("viewBox") or "").split())
    return x, y, w, h


def until(page: Page, condition: str) -> None:
    """Wait for it; the page's own policy forbids what ``wait_for_function`` does."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(condition)


def test_buttons_and_keys_zoom(opened: Open) -> None:
    page = opened(page="deep")
    before = view(page)
    page.locator("[data-zoom=in]").click()
    assert view(page)[2] == pytest.approx(before[2] / 1.25, abs=0.2)
    page.locator("[data-zoom=out]").click()
    assert view(page)[2] == pytest.approx(before[2], abs=0.2)
    page.locator(CANVAS).focus()
    page.keyboard.press("+")
    assert view(page)[2] == pytest.approx(before[2] / 1.25, abs=0.2)
    page.keyboard.press("-")
    assert view(page)[2] == pytest.approx(before[2], abs=0.2)
    page.keyboard.press("ArrowDown")
    assert view(page)[1] > before[1]
    page.keyboard.press("0")
    whole = page.evaluate("Object.values(view.whole)")
    assert view(page)[1] <= whole[1]
    assert view(page)[1] + view(page)[3] >= whole[1] + whole[3], "0 shows all of it"


def test_the_wheel_scrolls_the_page_until_the_graph_is_clicked(opened: Open) -> None:
    page = opened(page="deep")
    page.locator(CANVAS).scroll_into_view_if_needed()
    box = page.locator(CANVAS).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 200)
    before, scrolled = view(page), page.evaluate("scrollY")
    page.mouse.wheel(0, 120)
    until(page, f"scrollY > {scrolled}")
    assert view(page) == before
    page.locator(CANVAS).click(position={"x": 20, "y": 200})
    scrolled = page.evaluate("scrollY")
    page.mouse.wheel(0, -200)
    until(page, f"view.size.w / view.scale < {before[2]} - 1")
    assert page.evaluate("scrollY") == scrolled


def test_dragging_moves_and_opens_nothing(opened: Open) -> None:
    page = opened(page="deep")
    page.locator(CANVAS).scroll_into_view_if_needed()
    node = page.locator(f"{CANVAS} svg.graph a").nth(5)
    box = node.bounding_box()
    assert box is not None
    before = view(page)
    page.mouse.move(box["x"] + 20, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 20, box["y"] - 90, steps=4)
    page.mouse.up()
    assert view(page)[1] - before[1] == pytest.approx(100 * before[3] / page.evaluate("view.size.h"), rel=0.02)
    assert page.locator("#detail").is_hidden()
    node.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()


def test_w_walks_through_the_ops_from_the_worst(opened: Open, data: ReportData) -> None:
    page = opened()
    measured = [r for r in data.captures[0].records if r.same_input and not r.composite]
    worst = min(measured, key=lambda record: record.same_input.sqnr_db if record.same_input else 0.0)
    page.locator(CANVAS).focus()
    page.keyboard.press("w")
    assert page.evaluate("document.activeElement.dataset.op") == worst.name
    errors = [page.evaluate("parseFloat(document.activeElement.querySelector('tspan').textContent.slice(3))")]
    for _ in range(3):
        page.keyboard.press("w")
        errors.append(page.evaluate("parseFloat(document.activeElement.querySelector('tspan').textContent.slice(3))"))
    assert errors == sorted(errors)
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()


def test_calls_of_shared_modules_are_ringed(opened: Open) -> None:
    page = opened()
    ringed = page.locator(f"{CANVAS} a:has(rect.ring)")
    names = ringed.evaluate_all("all => all.map(node => node.querySelector('text').textContent)")
    assert sorted(names) == ["down (call 1)", "down (call 2)", "head (call 1)", "head (call 2)", "head (call 3)"]
    red, green, blue = map(
        int, re.findall(r"\d+", ringed.locator("rect.ring").first.evaluate("e => getComputedStyle(e).stroke"))
    )
    assert red > 2 * max(green, blue)


def test_calls_of_shared_modules_are_red_in_every_table(opened: Open) -> None:
    page = opened()
    for table in ("FvsQ", "QvsQ", "calls"):
        red = page.locator(f"#{table} td.shared a").all_text_contents()
        assert {name.split(" (")[0] for name in red} == {"down", "head"}, table
    assert page.locator("#calls tbody tr").count() == 5


def test_a_composite_is_one_op_until_it_is_unfolded(opened: Open) -> None:
    page = opened()
    whole = page.locator(f"{CANVAS} a", has_text="8 steps")
    assert whole.locator("text").first.text_content() == "norm"
    assert page.locator(f"{CANVAS} a[data-op='norm.var']").count() == 0
    page.locator("#unfold").check()
    page.locator(f"{CANVAS} a[data-op='norm.var']").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#detail h2")).to_have_text("norm.var")
    page.locator("#detail .close").click()
    page.locator("#unfold").uncheck()
    page.goto(page.url.split("#")[0] + "#op=norm.var")
    assert page.locator(f"{CANVAS} a.current text").first.text_content() == "norm", "it stands for its steps"


def test_the_colour_follows_the_comparison_that_is_chosen(opened: Open, data: ReportData) -> None:
    page = opened()
    seen = [op.same_input for capture in data.captures if (op := capture.find("stem")) and op.same_input]
    decibels = [f" · {10 * math.log10(one.ref_sq / one.se):.1f} dB" for one in seen]
    assert decibels[0] != decibels[1]
    node = page.locator(f"{CANVAS} a[data-op=stem]")
    fill = "e => getComputedStyle(e.querySelector('rect:last-of-type')).fill"
    shown = """e => [...e.querySelectorAll('tspan')].filter(t => getComputedStyle(t).display != 'none')
      .map(t => t.textContent)"""
    assert node.evaluate(shown) == decibels[:1]
    colour = node.evaluate(fill)
    page.get_by_label("fake-quant against integer").check()
    assert node.evaluate(fill) != colour
    assert node.evaluate(shown) == decibels[1:]


CONTRAST = """() => {
  const parse = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const node = document.querySelector(".canvas a");
  return ["l0", "l1", "l2", "l3", "l4", "equal"].map(function (level) {
    node.dataset.fvsq = level;
    const pair = [getComputedStyle(node.querySelector("text")).fill, getComputedStyle(node.querySelector("rect")).fill];
    const [a, b] = pair.map((text) => light(parse(text))).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_legible_on_every_colour(opened: Open, scheme: str) -> None:
    assert min(opened(color_scheme=scheme).evaluate(CONTRAST)) >= 4.5, "WCAG 2, level AA"


def test_the_focus_moves_the_graph_and_not_the_page(opened: Open) -> None:
    page = opened(page="deep")
    page.locator(CANVAS).focus()
    for _ in range(40):
        page.keyboard.press("Tab")
    node = page.locator(f"{CANVAS} a:focus")
    canvas, box = page.locator(CANVAS).bounding_box(), node.bounding_box()
    assert canvas is not None
    assert box is not None
    assert canvas["y"] <= box["y"] <= box["y"] + box["height"] <= canvas["y"] + canvas["height"]
    expect(node).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.querySelector('.canvas').scrollTop") == 0


def test_a_strip_beside_a_deep_network_leads_anywhere_in_it(opened: Open) -> None:
    page = opened(page="deep")
    strip = page.locator(f"{CANVAS} .map")
    expect(strip).to_be_visible()
    box = strip.bounding_box()
    assert box is not None
    strip.click(position={"x": 20, "y": box["height"] - 5})
    last = page.locator(f"{CANVAS} svg.graph a").last
    expect(last).to_be_in_viewport()
    shown, canvas = last.bounding_box(), page.locator(CANVAS).bounding_box()
    assert shown is not None
    assert canvas is not None
    assert shown["y"] + shown["height"] <= canvas["y"] + canvas["height"]
    assert shown["height"] > 20, "large enough to read"
    assert opened().locator(f"{CANVAS} .map").is_hidden()
