"""The section and the page of a compile estimate: figures against the numbers that they show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

import qatlib
from qatlib.analysis.report import ReportData, render
from qatlib.analysis.report.accelerator import accelerator, quantity, roofline, timeline
from qatlib.analysis.report.tables import digits
from qatlib.compiler import Executable, compile_model
from qatlib.errors import OutputError
from tests.compiler.compiler_nets import Net, random_net, residual, tiny
from tests.compiler.test_table_unit import BESIDE, branches


@pytest.fixture(scope="module")
def executable() -> Executable:
    return compile_model(residual()[1], tiny())


@pytest.fixture(scope="module")
def performance(executable: Executable) -> dict[str, Any]:
    return executable.performance.to_dict()


def test_a_dot_for_every_op_with_multiplications_and_none_above_the_roof(performance: dict[str, Any]) -> None:
    plot = str(roofline(performance))
    dots = re.findall(r'<circle class="b-(\w+)" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"><title>([^:]+):', plot)
    multiplying = [op for op in performance["ops"] if op["macs"]]
    assert {op["op"]: op["bound"] for op in multiplying} == {name: bound for bound, *_, name in dots}
    (points,) = re.findall(r'class="roof" points="([^"]+)"', plot)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in points.split())
    assert y1 == y2
    for _, cx, cy, _, _ in dots:
        x, y = float(cx), float(cy)
        top = y1 if x >= x1 else y1 + (y0 - y1) * (x1 - x) / (x1 - x0)
        assert y >= top - 0.5, "no op is faster than its target"
    assert x2 > x1
    # the area is the share of the latency
    radius = {name: float(r) for _, _, _, r, name in dots}
    total = performance["latency_us"]
    for op in multiplying:
        assert ((radius[op["op"]] - 3) / 14) ** 2 == pytest.approx(op["latency_us"] / total, abs=0.01)


def test_ops_lie_one_after_the_other_in_proportion(performance: dict[str, Any]) -> None:
    plot = str(timeline(performance))
    bars = re.findall(r'<rect class="b-\w+" x="([\d.]+)" y="14" width="([\d.]+)"', plot)
    ops = [op for op in performance["ops"] if op["latency_us"]]
    assert len(bars) == len(ops)
    left = float(bars[0][0])
    scale = (960 - 20 - left) / performance["latency_us"]
    for (x, _), op in zip(bars, ops, strict=True):
        assert float(x) == pytest.approx(left + op["start_us"] * scale, abs=0.01)
    assert plot.count('class="works"') == sum(row["busy"] > 0 for row in performance["units"])


def test_shares_of_a_unit_add_up(performance: dict[str, Any]) -> None:
    shown = accelerator(performance)
    assert [name for name, *_ in shown.units] == ["MAC array", "vector unit", "SRAM bus", "DRAM bus"]
    for _, busy, waits in shown.units:
        assert busy + sum(waits) == pytest.approx(1, abs=0.01)
    assert {kind for kind, _ in shown.bounds} == {f"b-{op['bound']}" for op in performance["ops"]} - {"b-none"}


def test_ops_that_run_at_once_stand_one_above_the_other() -> None:
    performance = branches(BESIDE).performance.to_dict()
    bars = re.findall(
        r'<rect class="b-(\w+)" x="([\d.]+)" y="(\d+)" width="([\d.]+)" height="(\d+)"', str(timeline(performance))
    )
    (table, left, _, short, _), (vector, same, _, long, _), (_, after, *_) = bars
    assert (table, vector) == ("table", "vector")
    assert [(y, height) for _, _, y, _, height in bars] == [("14", "13"), ("27", "13"), ("14", "26")]
    assert left == same
    assert float(short) < float(long) < float(after) - float(left)
    shown = accelerator(performance)
    assert "a table" in shown.causes
    assert "table unit" in [name for name, *_ in shown.units]
    for _, busy, waits in shown.units:
        assert busy + sum(waits) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("amount", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e13, "30 TB")]
)
def test_quantities(amount: float, shown: str) -> None:
    assert quantity(amount, "B") == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.01234567, "0.01235"), (12.0, "12"), (999.94, "999.9"), (12073.6, "12,074")]
)
def test_digits(value: float, shown: str) -> None:
    assert digits(value) == shown


def test_the_page_has_the_section_and_says_estimate(performance: dict[str, Any]) -> None:
    page = render(ReportData(performance=performance))
    assert 'id="performance"' in page
    assert "On the accelerator" in page
    assert str(escape(performance["basis"])) in page
    assert "int16 µs" not in page
    wide = compile_model(random_net(2, 12)[1], tiny()).performance.to_dict()
    assert "int16 µs" in render(ReportData(performance=wide))


def test_a_page_of_its_own(executable: Executable, tmp_path: Path) -> None:
    qatlib.visualize_model(executable, tmp_path / "model.html")
    page = (tmp_path / "model.html").read_text()
    assert "<svg" in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    for row in executable.performance.rows:
        assert row.op in page
    qatlib.visualize_model(executable, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_a_page_has_the_name_of_a_page(executable: Executable, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="QAT226"):
        qatlib.visualize_model(executable, tmp_path / "model.pdf")
    assert not list(tmp_path.iterdir())


def test_names_of_ops_are_text(tmp_path: Path) -> None:
    executable = compile_model(residual()[1], tiny())
    performance = executable.performance.to_dict()
    for op in performance["ops"]:
        op["op"] = f"<b>{op['op']}</b>"
    page = render(ReportData(performance=performance))
    assert "<b>conv" not in page
    assert "&lt;b&gt;conv" in page


def test_nothing_to_do_has_no_figures() -> None:
    net = Net()
    program = net.program(net.dequantize(net.quantize(net.input((4,), "float32"))))
    performance = compile_model(program, tiny()).performance.to_dict()
    assert (roofline(performance), timeline(performance)) == ("", "")
    assert "On the accelerator" in render(ReportData(performance=performance))
