"""Sorting, filtering and linking of tables, with the mouse and with keys."""

from __future__ import annotations

import math

from playwright.sync_api import Page, expect

from qatlib.analysis.report import ReportData
from tests.browser.conftest import Open

TABLE = "#t-FvsQ"


def column(page: Page, heading: str) -> list[str]:
    """Texts of the rows that are shown."""
    heads = page.locator(f"{TABLE} thead button").all_text_contents()
    return page.locator(f"{TABLE} tbody tr:visible td:nth-child({1 + heads.index(heading)})").all_text_contents()


def numbers(texts: list[str]) -> list[float]:
    """A dash, of what was not measured, is NaN."""
    return [math.nan if text == "–" else math.inf if text == "∞" else float(text.removesuffix(" %")) for text in texts]


def test_a_click_sorts_by_number_and_another_turns_it_around(opened: Open) -> None:
    page = opened()
    button = page.get_by_role("button", name="Op error LSB").first
    button.click()
    down = numbers(column(page, "Op error LSB"))
    button.click()
    up = numbers(column(page, "Op error LSB"))
    known = [value for value in up if not math.isnan(value)]
    assert known == sorted(known)
    assert len(known) < len(up), "an output without a scale has no LSB"
    assert all(map(math.isnan, up[len(known) :])), "what was not measured comes last"
    assert [value for value in down if not math.isnan(value)] == sorted(known, reverse=True)
    assert page.locator(f"{TABLE} th[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_names_sort_as_words(opened: Open) -> None:
    page = opened()
    page.locator(TABLE).get_by_role("button", name="Module").click()
    names = column(page, "Module")
    assert names[0] == "act"
    assert names.index("down (call 1)") < names.index("head (call 1)") < names.index("x.quant")


def test_all_words_of_the_filter_have_to_occur(opened: Open) -> None:
    page = opened()
    page.locator("input[data-table=t-FvsQ]").fill("conv2d int8")
    assert column(page, "Module") == ["stem", "down (call 1)", "down (call 2)"]
    page.locator("input[data-table=t-FvsQ]").fill("nothing of the kind")
    assert column(page, "Module") == []


def test_inner_steps_of_a_composite_are_folded(opened: Open) -> None:
    page = opened()
    assert "norm.shift" in column(page, "Module")
    assert "norm.var" not in column(page, "Module")
    page.locator("input[data-steps=t-FvsQ]").check()
    assert "norm.var" in column(page, "Module")
    page.locator("input[data-steps=t-FvsQ]").uncheck()
    page.locator("input[data-table=t-FvsQ]").fill("norm.v")
    assert column(page, "Module") == ["norm.var"], "the filter looks into them"


def test_a_name_in_any_table_opens_its_op(opened: Open) -> None:
    page = opened()
    page.locator("#t-QvsQ").get_by_role("link", name="down (call 2)").click()
    expect(page.locator("#detail h2")).to_have_text("down (call 2)")
    page.locator("#t-tables").get_by_role("link", name="sigmoid").click()
    expect(page.locator("#detail h2")).to_have_text("sigmoid")


def test_tables_read_and_link_without_scripts(opened: Open, data: ReportData) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator(f"{TABLE} tbody tr:visible").count() == len(data.captures[0].records)
    page.locator("#findings").get_by_role("link", name="down (call 2)").click()
    target = page.locator("tr:target")
    assert target.locator("td").nth(1).text_content() == "down (call 2)"
    assert page.locator("svg.graph").first.is_visible()
    assert page.locator("[data-zoom]").first.is_hidden()
