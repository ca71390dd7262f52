"""Every kind of Program op, in nets that people write: compiled for a shipped target, run from planned memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatlib.ops  # noqa: F401 registers the operators
from qatlib.compiler import Executable, Target, check_model, compile_model, load_target
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.ops.base import BY_KIND, Operator
from tests.kind_nets import IDS, INT16, MASK, NETS, ROWS
from tests.models import calibrated, model


def single_bytes() -> Target:
    """bayes-like with a DRAM that moves what is asked for."""
    target = load_target("bayes-like")
    return target.model_copy(update={"dram": target.dram.model_copy(update={"burst_bytes": 1})})


BOUNDARY = {"quantize", "dequantize", "float_op"}
ALIASES = {"sub", "div", "floor_divide", "masked_fill"}
"""Operators that lower to a more general kind."""


@pytest.mark.parametrize("name", NETS)
def test_the_executable_runs_what_the_emulator_runs(name: str) -> None:
    net = NETS[name]
    program = net.program()
    assert net.kinds <= {op.kind for op in program}
    executable = compile_model(program, "bayes-like")
    for batch in (1, 3):
        inputs = tuple(x[:batch] for x in net.inputs)
        ours, theirs = executable.run(*inputs), emulate(program, inputs)
        for value, a, b in zip(program.outputs, ours, theirs, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), value
            assert int((a != b).sum()) == 0, value


def test_the_nets_hold_every_kind() -> None:
    runnable = {kind for kind, operator in BY_KIND.items() if type(operator).kernel is not Operator.kernel}
    met = set[str]().union(*(net.kinds for net in NETS.values()))
    assert met == runnable - BOUNDARY - ALIASES


def test_the_larger_target_takes_every_kind_and_the_smaller_one_names_what_it_refuses() -> None:
    met = set[str]().union(*(net.kinds for net in NETS.values()))
    assert met == set(load_target("bayes-like").ops)
    small = load_target("bernoulli-like")
    assert set(small.ops) < met
    refused = check_model(NETS["attention"].program(), small)
    assert {v.code for v in refused} == {"QAT184", "QAT185"}
    assert any("has no 'matmul'" in v.seen for v in refused)


def test_the_smaller_target_runs_an_int8_net_with_tables_and_products() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def body(s: Any, x: Tensor) -> Tensor:
        y = F.hardswish(s.conv(x))
        y = y * torch.sigmoid(s.gate(y.mean((2, 3), keepdim=True)))
        return F.interpolate(F.prelu(s.up(y), s.slope), scale_factor=2.0)[:, :, 1:, ::2] + s.offset

    parts: dict[str, Any] = {
        "conv": nn.Conv2d(4, 8, 3, padding=1),
        "gate": nn.Conv2d(8, 8, 1),
        "up": nn.ConvTranspose2d(8, 4, 2, stride=2),
        "slope": nn.Parameter(torch.tensor([0.25])),
        "offset": nn.Parameter(torch.randn(4, 1, 1)),
    }
    program = to_program(calibrated(model(body, **parts), x))
    (ours,), (theirs,) = compile_model(program, "bernoulli-like").run(x), emulate(program, x)
    assert int((ours != theirs).sum()) == 0


def test_constants_stay_among_the_weights() -> None:
    program = NETS["constants"].program()
    executable = compile_model(program, single_bytes())
    fixed = {op.output for op in program if op.kind == "constant"}
    assert fixed
    assert not fixed & set(executable.memory.places)
    values = sum(program.values[name].bytes() for name in fixed)
    others = {
        key for op in program for key in op.consts.values() if op.kind not in ("constant", "quantize", "dequantize")
    }
    assert executable.memory.weight_bytes == values + sum(program.constants[key].nbytes for key in others)
    rows = {row.op: row for row in executable.performance.rows}
    assert all((rows[name].unit, rows[name].cycles) == ("weights", 0) for name in fixed)
    for op in program:
        if fixed & set(op.inputs):
            read = sum(program.values[name].bytes() for name in op.inputs if name in fixed)
            own = sum(program.constants[key].nbytes for key in op.consts.values())
            assert rows[op.name].dram_bytes == read + own, op.name


def test_an_embedding_pays_for_the_rows_it_reads() -> None:
    program = NETS["embedding of ids"].program()
    (op,) = (op for op in program if op.kind == "embedding")
    (row,) = (row for row in compile_model(program, single_bytes()).performance.rows if row.op == op.name)
    rows = program.values[op.output].bytes()
    assert row.dram_bytes == rows != program.values[op.inputs[0]].bytes()
    assert row.sram_bytes == program.values[op.inputs[1]].bytes() + rows


def test_a_compiled_net_with_constants_saves_and_loads(tmp_path: Path) -> None:
    net = NETS["constants"]
    executable = compile_model(net.program(), "bayes-like")
    executable.save(tmp_path / "compiled")
    again = Executable.load(tmp_path / "compiled")
    assert again.memory == executable.memory
    for ours, theirs in zip(again.run(*net.inputs), executable.run(*net.inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_ids_and_truth_values_in_other_integer_types() -> None:
    executable = compile_model(NETS["embedding of ids"].program(), "bayes-like")
    assert torch.equal(executable.run(IDS.int())[0], executable.run(IDS)[0])
    for bad in (IDS.float(), IDS + 2**32):
        with pytest.raises(ProgramError, match="QAT180"):
            executable.run(bad)
    masks = compile_model(NETS["masks"].program(), "bayes-like")
    for ours, theirs in zip(masks.run(ROWS, MASK.to(torch.int8)), masks.run(ROWS, MASK), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ProgramError, match="QAT180"):
        masks.run(ROWS, MASK.long() * 2)


def test_a_batch_that_needs_several_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the batch is not the outermost part of an output's axis."""
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    net = model(lambda s, x: (s.fc(x), s.fc(x).transpose(0, 1).reshape(-1, 4)), fc=nn.Linear(8, 4))
    program = to_program(calibrated(net, x))
    monkeypatch.setattr("qatlib.compiler.executable._ARENA_BYTES", 1)
    for ours, theirs in zip(compile_model(program, "bayes-like").run(x), emulate(program, x), strict=True):
        assert torch.equal(ours, theirs)


def test_cost_of_a_product_of_matrices() -> None:
    """3 heads of 5 x 40 by 40 x 20."""
    x = torch.randn(2, 3, 5, 40)
    body = model(lambda s, x: torch.matmul(x, x.transpose(2, 3).repeat(1, 1, 1, 4)))
    program = to_program(calibrated(body, x))
    (op,) = (op for op in program if op.kind == "matmul")
    (row,) = (row for row in compile_model(program, "bayes-like").performance.rows if row.op == op.name)
    assert row.unit == "mac"
    assert row.macs == 3 * 5 * 40 * 20
    assert row.mac_cycles == 3 * 2 * 3  # heads, 20 in tiles of 16 columns, 40 in steps of 16; the 5 rows are one tile


def test_cost_of_a_transposed_convolution() -> None:
    """Every element of the input meets every weight of its channel once, whatever the stride."""
    x = torch.randn(2, 8, 5, 5)
    program = to_program(calibrated(model(lambda s, x: s.up(x), up=nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2)), x))
    (row,) = (row for row in compile_model(program, "bayes-like").performance.rows if row.op == "up")
    assert row.macs == 8 * 25 * 3 * 16


def test_a_product_of_wide_codes_needs_a_rate() -> None:
    target = load_target("bayes-like")
    array = target.mac_array.model_copy(update={"int16": None})
    narrow = target.model_copy(update={"mac_array": array})
    x = torch.randn(2, 5, 8)
    net = model(lambda s, x: x @ s.fc(x).transpose(1, 2), fc=nn.Linear(8, 8))
    program = to_program(calibrated(net, x, qconfig_dict={"module_name": {"fc": INT16}}))
    (op,) = (op for op in program if op.kind == "matmul")
    assert not [v for v in check_model(program, target) if v.op == op.name]
    (violation,) = (v for v in check_model(program, narrow) if v.op == op.name)
    assert (violation.code, violation.fix) == ("QAT185", "Make it int8 in qconfig")
