"""The table of fake-quant against Program, op by op on the same integers."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qatlib
from qatlib.analysis.agreement import gap_table, gaps, most_share
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from tests.analysis.analysis_nets import Trio, quantized
from tests.models import model


def test_a_planted_difference_is_counted_at_its_op_alone(trio: Trio) -> None:
    """A bias that is off by three output codes in one channel moves that op, and no other: inputs are the same."""
    program, x = trio.integer.program, trio.batches[0]
    before = gaps(trio.fake, program, x)
    op = next(op for op in program if op.name == "block")
    bias, channel = program.constant(op, "bias").clone(), 2
    step = 2.0 ** int(program.constant(op, "shift")[channel]) / int(program.constant(op, "multiplier")[channel])
    bias[channel] += round(3 * step)
    planted = replace(program, constants={**program.constants, op.consts["bias"]: bias})
    after = gaps(trio.fake, planted, x)
    right, wrong = (emulate(p, x, trace=True)[1]["block"] for p in (program, planted))
    assert before["block"].differing == 0
    assert after["block"].differing == int((right != wrong).sum()) > 0
    assert after["block"].largest == float((right - wrong).abs().max()) == 3
    assert after["block"].share == after["block"].differing / right.numel()
    assert {name for name, gap in after.items() if gap.differing > before[name].differing + 1} == {"block"}


def test_time_steps_are_one_row_and_tables_state_their_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = model(lambda s, x: s.rnn(x)[0], rnn=nn.GRU(4, 6, batch_first=True))
    x = torch.randn(8, 5, 4)
    fake = quantized(net, (x,))
    program = to_program(fake)
    rows, single = gap_table(fake, program, x), gaps(fake, program, x)
    assert sum(row.ops for row in rows) == len(single)
    assert len(rows) < len(single) / 3
    assert sum(row.elements for row in rows) == sum(gap.elements for gap in single.values())
    assert sum(row.differing for row in rows) == sum(gap.differing for gap in single.values())
    tables = [row for row in rows if row.kind == "table"]
    worst = {op.attrs["function"]: 0.0 for op in program if op.kind == "table"}
    for op in program:
        if op.kind == "table":
            worst[op.attrs["function"]] = max(worst[op.attrs["function"]], op.attrs["table"]["worst_lsb"])
    assert {row.stored_lsb for row in tables} == set(worst.values())
    assert all(row.ops == 5 and ".t*" in row.name for row in tables)
    assert all(row.stored_lsb is None for row in rows if row.kind != "table")

    text = qatlib.write_gap_table(rows, tmp_path / "lsb.csv")
    assert (tmp_path / "lsb.csv").read_text() == text
    for line, row in zip(csv.DictReader(text.splitlines()), rows, strict=True):
        assert (line["name"], int(line["differing"]), int(line["ops"])) == (row.name, row.differing, row.ops)
        assert float(line["share"]) == pytest.approx(row.differing / row.elements, rel=1e-5)
        assert line["stored_lsb"] == ("" if row.stored_lsb is None else f"{row.stored_lsb:.6g}")


def test_the_bounds_are_those_of_the_contract() -> None:
    text = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    section = " ".join(text[text.index("## 5. ") : text.index("## 6. ")].split())
    for kind, dtype, share, says in (
        ("conv", "int8", 0.001, "on fewer than 0.1 % of elements"),
        ("linear", "int16", 2**-5, "2^(15-b), 3 % for b = 20"),
        ("resize_linear", "int8", 1 / 8, "at most 1 in 8"),
        ("grid_sample", "int16", 1 / 8, "at most 1 in 8"),
    ):
        assert says in section
        assert most_share(kind, dtype) == share
