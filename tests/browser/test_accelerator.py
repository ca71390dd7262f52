"""The page of a compiled Program in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

import qatlib
from qatlib.compiler import compile_model
from tests.browser.conftest import Open
from tests.compiler.compiler_nets import residual, tiny


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("accelerator") / "model.html"
    qatlib.visualize_model(compile_model(residual()[1], tiny()), path)
    return str(path)


def test_the_table_sorts_and_filters(opened: Open, page_file: str) -> None:
    page = opened(page=page_file)
    page.get_by_role("button", name="Latency µs").click()
    rows = page.locator("#t-performance tbody tr")
    shown = [float(text.replace(",", "")) for text in rows.locator("td:nth-child(4)").all_text_contents()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > 0
    page.get_by_label("Filter").fill("linear")
    expect(rows.locator("visible=true")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_figures_are_seen_and_nothing_sticks_out(opened: Open, page_file: str, scheme: str, width: int) -> None:
    page = opened(page=page_file, width=width, color_scheme=scheme)
    for kind in ("roofline", "timeline"):
        figure = page.locator(f"svg.{kind}")
        expect(figure).to_be_visible()
        for text in figure.locator("text").all():
            box, outer = text.bounding_box(), figure.bounding_box()
            assert box
            assert outer
            assert outer["x"] - 1 <= box["x"]
            assert box["x"] + box["width"] <= outer["x"] + outer["width"] + 1
            assert box["y"] + box["height"] <= outer["y"] + outer["height"] + 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_colours_of_the_limits_are_apart_from_the_ground(opened: Open, page_file: str) -> None:
    for scheme in ("light", "dark"):
        page = opened(page=page_file, color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.querySelector('.scroll')).backgroundColor")
        fills = page.evaluate("[...document.querySelectorAll('svg.timeline rect')].map(r => getComputedStyle(r).fill)")
        assert fills
        assert ground not in fills
        assert "rgb(0, 0, 0)" not in fills, "a limit without a colour"


def test_it_is_one_file(page_file: str) -> None:
    assert [path.name for path in Path(page_file).parent.iterdir()] == ["model.html"]
