"""The fuse check: every op that stays alone is listed with the reason and the edit, and what is fused is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib import check_unfused_operations, get_default_qconfig, prepare_qat_fx
from qatlib.analysis.facts import Facts
from qatlib.analysis.report import ReportData, render
from qatlib.analysis.rules import run_rules
from qatlib.analysis.unfused import Unfused, unfused_operations
from qatlib.fake.prepare import fuse_fx
from tests.analysis.analysis_nets import Net
from tests.models import everything, images, model

X = images(2, 4, 6)


def conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(4, channels, 3, padding=1)


def whole(x: Tensor) -> Tensor:
    return x * 2


def unfused(body: Callable[..., Any], x: Tensor = X, **parts: nn.Module) -> list[tuple[str, str, str, str]]:
    """(op, host, pattern, reason) of every row."""
    parts = parts or {"c": conv(), "d": conv(), "b": nn.BatchNorm2d(4), "r": nn.ReLU()}
    rows = unfused_operations(fuse_fx(model(body, **parts), [x], wrap=[whole]))
    return [(row.op, row.host, row.pattern, row.reason) for row in rows]


Body = Callable[[Any, Tensor], Any]
PLANTED: dict[str, tuple[Body, tuple[str, str, str, str]]] = {
    "bn, other reader": (
        lambda s, x: (lambda y: s.b(y) + F.max_pool2d(y, 1))(s.c(x)),
        ("b", "c", "Conv2d + BatchNorm2d", "readers"),
    ),
    "relu, other reader": (lambda s, x: (lambda y: s.r(y) * y)(s.c(x)), ("r", "c", "Conv2d + ReLU", "readers")),
    "bn relu, other reader": (
        lambda s, x: (lambda y: s.r(y) * y)(s.b(s.c(x))),
        ("r", "c", "Conv2d + BatchNorm2d + ReLU", "readers"),
    ),
    "relu, output": (lambda s, x: (lambda y: (y, s.r(y)))(s.c(x)), ("r", "c", "Conv2d + ReLU", "output")),
    "add, output": (lambda s, x: (lambda y: (y, y + x))(s.c(x)), ("add", "c", "Conv2d + add", "output")),
    "bn behind relu": (lambda s, x: s.b(s.r(s.c(x))), ("b", "c", "Conv2d + BatchNorm2d", "order")),
    "relu behind pool": (lambda s, x: s.r(F.max_pool2d(s.c(x), 2)), ("r", "c", "Conv2d + ReLU", "order")),
    "relu behind view": (lambda s, x: s.r(s.c(x).flatten(1)), ("r", "c", "Conv2d + ReLU", "order")),
    "add behind relu": (lambda s, x: s.r(s.c(x)) + x, ("add", "c", "Conv2d + add", "order")),
    "add of a broadcast value": (
        lambda s, x: s.c(x) + F.adaptive_avg_pool2d(x, 1),
        ("add", "c", "Conv2d + add", "shape"),
    ),
    "third addend": (lambda s, x: s.c(x) + s.d(x) + x, ("add#1", "d", "Conv2d + add", "taken")),
    "y + y": (lambda s, x: (lambda y: y + y)(s.c(x)), ("add", "c", "Conv2d + add", "itself")),
    "two clamps": (lambda s, x: F.relu6(s.r(s.c(x))), ("relu6", "c", "Conv2d + relu6", "clamped")),
    "bn behind a wrapped function": (lambda s, x: s.b(whole(s.c(x))), ("b", "", "", "kept whole")),
    "bn behind a product": (lambda s, x: s.b(x * s.c(x)), ("b", "", "", "nothing")),
}


@pytest.mark.parametrize(("body", "wanted"), PLANTED.values(), ids=PLANTED.keys())
def test_the_op_its_host_and_the_reason(body: Body, wanted: tuple[str, str, str, str]) -> None:
    assert unfused(body) == [wanted]


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_every_layer_of_the_pattern_is_a_host(layer: type[nn.Module]) -> None:
    sizes = {nn.Conv1d: (8,), nn.Conv3d: (4, 4, 4)}.get(layer, (6, 6))
    (row,) = unfused(lambda s, x: (lambda y: F.relu(y) * y)(s.c(x)), torch.randn(2, 4, *sizes), c=layer(4, 4, 3))
    assert row == ("relu", "c", f"{layer.__name__} + relu", "readers")


def test_a_batch_norm_over_another_axis_than_the_linear() -> None:
    rows = unfused(lambda s, x: s.b(s.l(x)), torch.randn(2, 4, 6), l=nn.Linear(6, 5), b=nn.BatchNorm1d(4))
    assert rows == [("b", "l", "Linear + BatchNorm1d", "shape")]


@pytest.mark.parametrize("net", [everything(), Net().eval()], ids=["everything", "net"])
def test_what_is_fused_is_not_listed(net: nn.Module) -> None:
    graph = fuse_fx(net, [images(2)])
    fused = {part.name for node in graph.nodes for part in node.fused}
    rows = unfused_operations(graph)
    assert fused
    assert not fused & {row.op for row in rows}
    kinds = {"batch_norm", "add", "clamp"}
    alone = {node.name for node in graph.nodes if node.op in kinds or node.module_type.endswith("BatchNorm2d")}
    assert alone == {row.op for row in rows}


def test_a_float_boundary_is_named() -> None:
    net = model(lambda s, x: s.r(s.c(x)), c=conv(), r=nn.ReLU())
    net.r.qconfig = None
    net.qconfig = get_default_qconfig()
    (row,) = unfused_operations(fuse_fx(net, [X]))
    assert (row.op, row.host, row.reason) == ("r", "c", "float")


def test_integers_and_inner_steps_are_no_part_of_the_pattern() -> None:
    ids = torch.arange(10)[None]
    assert unfused_operations(fuse_fx(model(lambda s, x: ((x + 3).clamp(min=4), x * 0.5)), [ids])) == ()
    norm = model(lambda s, x: s.n(x), n=nn.LayerNorm(6))
    assert unfused_operations(fuse_fx(norm, [torch.randn(2, 4, 6)])) == ()


def test_the_table_of_both_forms_of_a_model(tmp_path: Path) -> None:
    net = model(lambda s, x: (lambda y: s.r(y) * y)(s.b(s.c(x))), c=conv(), b=nn.BatchNorm2d(4), r=nn.ReLU())
    table = check_unfused_operations(net, [X], path=tmp_path / "fuse.csv")
    row = table.iloc[0]
    assert row["seen"] == "mul also reads c, which therefore stays as it is"
    assert row["fix"] == "Let mul read what r makes, or give it a layer of its own"
    assert row["where"].startswith("test_unfused.py:")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "fuse.csv"), table)
    pd.testing.assert_frame_equal(check_unfused_operations(prepare_qat_fx(net, example_inputs=[X])), table)


def findings(body: Body) -> list[tuple[str, str, str]]:
    parts = {"c": conv(), "d": conv(), "b": nn.BatchNorm2d(4), "r": nn.ReLU()}
    rows: tuple[Unfused, ...] = unfused_operations(fuse_fx(model(body, **parts), [X], wrap=[whole]))
    return [(f.code, f.severity, f.module) for f in run_rules(Facts(unfused=rows))]


def test_the_rule_names_what_an_edit_of_the_model_would_fuse() -> None:
    assert findings(PLANTED["bn behind relu"][0]) == [("QAT026", "warning", "b")]
    assert findings(PLANTED["relu behind pool"][0]) == [("QAT026", "info", "r")]
    assert findings(PLANTED["bn behind a wrapped function"][0]) == [("QAT026", "warning", "b")]
    for nothing_to_gain in ("third addend", "bn behind a product"):
        assert findings(PLANTED[nothing_to_gain][0]) == []


def test_the_rule_counts_the_others_of_a_kind() -> None:
    net = model(lambda s, x: s.b(s.r(s.d(s.e(s.r(s.c(x)))))), c=conv(), r=nn.ReLU(), e=nn.BatchNorm2d(4), d=conv(),
                b=nn.BatchNorm2d(4))  # fmt: skip
    (finding,) = run_rules(Facts(unfused=unfused_operations(fuse_fx(net, [X]))))
    assert finding.module == "e"
    assert finding.evidence["unfused_batch_norms"] == 2
    assert finding.evidence["pattern"] == "Conv2d + BatchNorm2d"
    assert finding.edit == "Put e directly behind c and train the float model so (in the model)"


def test_the_page_lists_what_stayed_unfused() -> None:
    net = model(lambda s, x: s.b(s.r(s.c(x))), c=conv(), r=nn.ReLU(), b=nn.BatchNorm2d(4))
    page = render(ReportData(unfused=unfused_operations(fuse_fx(net, [X]))))
    assert 'href="#fuse"' in page
    assert "r lies between c and b" in page
    assert "Conv2d + BatchNorm2d" in page
    assert 'id="fuse"' not in render(ReportData())
