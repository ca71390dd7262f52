"""The panel of an op: how it is reached and left, its numbers, its histograms."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.records import OpRecord
from qatlib.analysis.report import ReportData, render
from tests.analysis.planted import records
from tests.browser.conftest import Open


def op(data: ReportData, name: str) -> OpRecord:
    found = data.captures[0].find(name)
    assert found is not None
    return found


def fact(page: Page, row: str) -> list[str]:
    """Numbers of one row of the first comparison."""
    cells = page.locator("#detail section").first.locator("tr", has=page.get_by_role("rowheader", name=row, exact=True))
    return cells.locator("td").all_text_contents()


def test_a_click_in_the_graph_shows_the_numbers_of_the_op(opened: Open, data: ReportData) -> None:
    page = opened()
    page.locator("a[data-op='down#1']").first.click()
    expect(page.locator("#detail h2")).to_have_text("down (call 2)")
    seen = op(data, "down#1")
    assert seen.accumulated is not None
    assert seen.same_input is not None
    assert seen.reference is not None
    assert seen.scale is not None
    decibels = [10 * math.log10(c.ref_sq / c.se) for c in (seen.accumulated, seen.same_input)]
    assert list(map(float, fact(page, "SQNR dB"))) == pytest.approx(decibels, rel=1e-3)
    lsb = [c.max_abs / seen.scale for c in (seen.accumulated, seen.same_input)]
    assert list(map(float, fact(page, "Largest error LSB"))) == pytest.approx(lsb, rel=1e-3)
    deviation = math.sqrt(seen.reference.var)
    expected = [seen.reference.min, seen.reference.max, seen.reference.mean, deviation]
    assert list(map(float, fact(page, "float"))) == pytest.approx(expected, rel=1e-3)
    assert page.locator("#detail section").count() == 2, "one for each capture"
    assert page.locator("#detail .about li").all_text_contents() == ["warning QAT008 Large error of its own"]
    assert page.url.endswith("#op=down%231")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_bars_stand_for_the_counts_of_the_codes(opened: Open, data: ReportData, logarithmic: bool) -> None:
    page = opened("#op=down%231")
    if logarithmic:
        page.locator("#detail input.log").first.check()
    seen = op(data, "down#1").accumulated
    assert seen is not None
    assert seen.histograms is not None
    counts = [np.array(row, dtype=float).reshape(64, 4).sum(1) for row in seen.histograms]
    shown = [np.log10(1 + row) if logarithmic else row for row in counts]
    for row, kind in zip(shown, ("first", "second"), strict=True):
        path = page.locator(f"#detail svg.histogram path.{kind}").first.get_attribute("d") or ""
        bottom = float(path.split("V")[0].split()[1])
        heights = bottom - np.array([float(v) for v in re.findall(r"V([\d.]+)H", path)])
        inside = np.trim_zeros(row)
        assert heights == pytest.approx(inside / np.max(shown) * np.max(bottom - 18), abs=0.06)


def test_clip_lines_stand_at_the_ends_of_the_format(opened: Open, data: ReportData) -> None:
    page = opened("#op=down%231")
    picture, seen = page.locator("#detail svg.histogram").first, op(data, "down#1")
    assert seen.scale is not None
    assert seen.accumulated is not None
    ends = [float(text) for text in picture.locator("text").all_text_contents()]
    assert ends == pytest.approx([-128 * seen.scale, 127 * seen.scale, 0.0], rel=1e-3)
    low, high = (float(line.get_attribute("x1") or 0) for line in picture.locator("line.clip").all())
    zero = float(picture.locator("text").nth(2).get_attribute("x") or 0)
    assert (zero - low) / (high - zero) == pytest.approx(128 / 127, rel=1e-3)
    assert picture.locator(".beyond").count() == 2, "the inputs go beyond those of calibration"
    cut = 100 * (seen.accumulated.saturated or 0) / seen.accumulated.count
    words = page.locator("#detail section").first.locator(".note").last.text_content() or ""
    assert float(words.split(" %")[0]) == pytest.approx(cut, rel=1e-2)


def test_an_op_without_a_scale_has_numbers_and_no_histogram(opened: Open) -> None:
    page = opened("#op=head")
    assert fact(page, "SQNR dB")[0] != "–"
    assert fact(page, "Largest error LSB") == ["–", "–"]
    assert page.locator("#detail svg.histogram").count() == 0
    assert "float32" in (page.locator("#detail").text_content() or "")


def test_back_closes_the_panel_and_forward_opens_it(opened: Open) -> None:
    page = opened()
    page.locator("a[data-op=stem]").first.click()
    page.locator("a[data-op=act]").first.click()
    expect(page.locator("#detail h2")).to_have_text("act")
    page.go_back()
    expect(page.locator("#detail h2")).to_have_text("stem")
    page.go_back()
    expect(page.locator("#detail")).to_be_hidden()
    page.go_forward()
    expect(page.locator("#detail h2")).to_have_text("stem")


def test_escape_closes_and_puts_the_focus_back(opened: Open) -> None:
    page = opened()
    page.locator("a[data-op=stem]").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
    expect(page.locator("a[data-op=stem]").first).to_be_focused()
    assert "#" not in page.url


def test_the_panel_leads_to_neighbours_calls_and_steps(opened: Open) -> None:
    page = opened("#op=down%231")
    links = page.locator("#detail .links")
    assert links.all_text_contents() == [
        "Reads down (call 1)", "Read by permute, sigmoid", "Calls of the module down (call 1), down (call 2)",
    ]  # fmt: skip
    links.first.get_by_role("link").click()
    expect(page.locator("#detail h2")).to_have_text("down (call 1)")
    page.goto(page.url.split("#")[0] + "#op=norm.shift")
    assert (links.last.text_content() or "").startswith("Steps of the composite norm.mean, norm.sub, ")
    assert page.locator("#detail .about li").count() == 1, "a finding about the whole is one about its last step"


def test_a_finding_of_a_module_is_about_all_of_its_calls(opened: Open) -> None:
    page = opened("#op=head%232")
    assert page.locator("#detail .about a").all_text_contents() == ["QAT011"]
    page.locator("#detail .about a").click()
    target = page.locator("[id='QAT011-head']")
    expect(target).to_have_js_property("open", True)
    expect(target).to_be_in_viewport()
    expect(page.locator("#detail")).to_be_hidden()


def test_the_address_of_a_finding_unfolds_it(opened: Open) -> None:
    page = opened()
    assert page.locator("details.finding[open]").count() == 3
    page.goto(page.url + "#QAT011-head")
    expect(page.locator("[id='QAT011-head']")).to_have_js_property("open", True)
    page = opened("#QAT011-norm")
    expect(page.locator("[id='QAT011-norm']")).to_have_js_property("open", True)
    expect(page.locator("[id='QAT011-norm']")).to_be_in_viewport()


@pytest.mark.parametrize("address", ["#op=", "#op=no.such", "#op=__proto__", "#op=%E0%A4%A", "#nothing"])
def test_an_address_of_nothing_opens_nothing(opened: Open, address: str) -> None:
    assert opened(address).locator("#detail").is_hidden()


def test_names_of_a_hostile_model_are_text(opened: Open, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=document.title='taken'>"
    finding = Finding("QAT008", "error", evil, evil, {evil: 1}, evil, evil)
    seen = records(conv1={"name": evil, "module": evil}, conv2={"inputs": (evil,)}, join={"inputs": (evil, "conv2")})
    (tmp_path / "evil.html").write_text(render(ReportData(Found((finding,)), (seen,))), encoding="utf-8")
    page = opened(page=str(tmp_path / "evil.html"))
    page.locator("svg.graph a").nth(1).click()
    expect(page.locator("#detail h2")).to_have_text(evil)
    assert page.locator("#detail .about li").text_content() == f"error QAT008 {evil}"
    assert page.locator("img").count() == 0
    assert page.title() == f"{evil}: Quantization report"


def test_a_dot_of_the_plot_opens_its_op(opened: Open) -> None:
    page = opened()
    page.locator("#FvsQ svg.depth a", has=page.locator("title", has_text="act:")).click()
    expect(page.locator("#detail h2")).to_have_text("act")
