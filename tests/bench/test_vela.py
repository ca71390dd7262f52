"""bench/vela: the committed tables agree with themselves, and the readers take what Vela writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import process_time

import pytest
import torch
from torch import nn

from bench.vela import ours
from bench.vela.compile import layers, read_tables
from bench.vela.tables import BUFFERS, LAYERS, TOTALS, Buffer, Layer, Total, read_rows, write_rows
from qatlib.compiler.job import describe
from qatlib.compiler.placement import time_all
from qatlib.compiler.timeline import simulate

ROWS: list[Layer] = read_rows(LAYERS, Layer)
CASES: list[Total] = read_rows(TOTALS, Total)


@pytest.mark.parametrize("total", CASES, ids=lambda total: f"{total.network}-{total.config}")
def test_the_layers_add_up_to_the_network(total: Total) -> None:
    rows = [row for row in ROWS if (row.network, row.config) == (total.network, total.config)]

    assert sum(row.cycles for row in rows) == total.cycles
    assert [row.place for row in rows] == list(range(len(rows)))
    for row in rows:
        assert row.cycles == max(row.npu_cycles, row.sram_cycles, row.off_cycles)
        assert all(int(source) < row.place for source in row.reads.split())


@pytest.mark.parametrize("total", CASES, ids=lambda total: f"{total.network}-{total.config}")
def test_the_peak_is_what_lives_at_once(total: Total) -> None:
    live: Counter[int] = Counter()
    for buffer in read_rows(BUFFERS, Buffer):
        if (buffer.network, buffer.config, buffer.memory) == (total.network, total.config, "sram"):
            for step in range(buffer.first, buffer.last + 1):
                live[step] += buffer.size

    assert max(live.values()) == total.sram_peak


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", ROWS[:3])

    assert read_rows(tmp_path / "rows.csv", Layer) == ROWS[:3]


def _document(tables: dict[str, list[dict[str, object]]]) -> str:
    text = "<?xml version='1.0'?>\n<debug>\n"
    for name, rows in tables.items():
        lines = [",".join(f'"{key}"' for key in rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
        text += f'<table name="{name}">\n<![CDATA[\n' + "\n".join(lines) + "\n]]>\n</table>\n"
    return text + "</debug>\n"


def _shapes(number: int, ifm: tuple[int, ...], ofm: tuple[int, ...], **more: object) -> dict[str, object]:
    """A row of Vela's table of shapes, as far as it is read."""
    row: dict[str, object] = {"id": number}
    for name, sizes in (("ifm", ifm), ("ifm2", (0, 0, 0)), ("ofm", ofm)):
        for kind, values in (("shape", sizes), ("slice", (0, 0, 0))):
            row |= {f"{name}_{kind}_{axis}": size for axis, size in zip("hwc", values, strict=True)}
        row |= {f"{name}_memory": "Sram", f"{name}_format": "NHWC", f"{name}_dtype": "Int8"}
    row |= {"kernel_size_y": 3, "kernel_size_x": 5, "kernel_stride_y": 2, "kernel_stride_x": 1, "ofm_stripe_h": 4}
    row |= {"weight_total_bytes": 700, "ofm_depth_slices": "0|16|24", "weight_buffering": "Double", "cascade": 0}
    return row | {"transpose_type": "None", "SramFeatureMap_read": 11, "SramWeights_read": 5, "DramLut_read": 2} | more


def test_a_fused_activation_and_a_fused_transpose_belong_to_their_layer() -> None:
    def perf(number: int, operator: str, cycles: int) -> dict[str, object]:
        same = {"op_cycles": cycles, "npu_cycles": cycles, "mac_count": 0, "Sram_ac": 3, "Dram_ac": 4}
        return {"id": number, "operator": operator, "name": f"net_wrapped/Conv2d_{number}", "staging_usage": 9, **same}

    block = {f"{name}_{axis}": 8 for name in ("ifm_block", "ofm_block", "ofm_ublock") for axis in "hwc"}
    config = {"traversal": "DepthFirst", "mac_cycles": 6, "ao_cycles": 5}
    tables = {
        "perf": [perf(7, "Conv2D", 10), perf(8, "Relu", 0), perf(9, "Transpose", 0), perf(12, "Add", 20)],
        "perf_debug": [
            _shapes(7, (8, 6, 2), (24, 4, 6), transpose_type="NCHW"),
            _shapes(8, (4, 6, 24), (24, 4, 6)), _shapes(9, (4, 6, 24), (24, 4, 6)),
            _shapes(12, (24, 4, 6), (24, 4, 6), weight_total_bytes="", ofm_depth_slices=""),
        ],
        "perf_debug_main": [{"id": 7, **block, **config}, {"id": 12, **block, **config}],
        "perf_debug_conn": [
            {"id": 7, "input_op_id": -1}, {"id": 8, "input_op_id": 7}, {"id": 12, "input_op_id": 9},
            {"id": 12, "input_op_id": 3},
        ],
        "tensors": [{"id": 2, "name": "net_wrapped/Conv2d_9", "usage": "OpLocal"}],
    }  # fmt: skip

    first, second = layers(read_tables(_document(tables)), "net", "u55-256")

    assert (first.kind, first.fused, first.reads, first.writes) == ("Conv2D", "Relu+Transpose", "-1", 2)
    assert (first.ifm, first.ofm, first.kernel, first.stride) == ("8x6x2", "4x6x24", "3x5", "2x1")
    assert (first.weights, first.weight_bytes, first.depth_slices) == (3 * 5 * 2 * 24, 700, 2)
    assert (first.sram_read, first.off_read, first.off_cycles) == (16, 2, 4)
    assert (second.kind, second.reads, second.weights, second.depth_slices) == ("Add", "0", 0, 1)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


def test_layers_are_paired_by_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.NETWORKS, "net", (_Net, (1, 3, 10, 6)))
    executable = ours.compiled(ours.program("net"), "u55-256")
    conv = replace(ROWS[0], kind="Conv2D", kernel="3x3", ofm="10x6x8")
    theirs = [
        replace(conv, ifm="10x6x8", cycles=200), replace(conv, kind="Add", ifm="10x6x3", cycles=1),
        replace(conv, ifm="10x6x3", cycles=100),
        replace(conv, kind="FullyConnected", ifm="1x1x8", ofm="1x1x5", kernel="1x1", cycles=300),
    ]  # fmt: skip

    found = ours.pairs(executable, theirs)

    cycles = {row.op: row.cycles for row in executable.performance.rows}
    assert [pair.vela for pair in found] == [100, 200, 300]
    assert [pair.ours for pair in found] == [cycles[pair.name] for pair in found]


def test_rank_correlation_shares_the_ranks_of_equal_values() -> None:
    assert ours.rank_correlation([1, 20, 300], [5, 6, 7]) == pytest.approx(1)
    assert ours.rank_correlation([1, 20, 300], [7, 6, 5]) == pytest.approx(-1)
    # ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, squares 4.5 and 5
    assert ours.rank_correlation([2, 2, 8, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_what_is_added_together_is_compared_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.skip = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.main(x) + self.skip(x)

    monkeypatch.setitem(ours.NETWORKS, "net", (Shortcut, (1, 3, 10, 6)))
    executable = ours.compiled(ours.program("net"), "u85-256")
    total = sum(row.cycles for row in executable.performance.rows)
    skip = replace(ROWS[0], kind="Conv2D", fused="", ifm="10x6x3", ofm="10x6x8", kernel="1x1", place=0, cycles=50)
    main = replace(skip, kernel="3x3", place=1, cycles=100)

    (fused,) = ours.pairs(executable, [replace(skip, fused=""), replace(main, fused="Add")])
    assert (fused.ours, fused.vela) == (total, 150)

    add = replace(skip, kind="Add", place=2, reads="0 1", cycles=7)
    apart = ours.pairs(executable, [skip, main, add])
    assert (sum(pair.ours for pair in apart), sum(pair.vela for pair in apart)) == (total, 157)


@pytest.mark.slow
@pytest.mark.parametrize("network", ours.NETWORKS)
def test_our_estimates_are_near_those_of_vela(network: str) -> None:
    made = ours.program(network)
    for total in CASES:
        if total.network != network:
            continue
        executable = ours.compiled(made, total.config)
        both = ours.pairs(executable, [row for row in ROWS if (row.network, row.config) == (network, total.config)])
        assert executable.performance.cycles == pytest.approx(total.cycles, rel=0.25)
        assert executable.memory.sram.peak_bytes == pytest.approx(total.sram_peak, rel=0.2)
        assert ours.rank_correlation([pair.ours for pair in both], [pair.vela for pair in both]) >= 0.9
        assert len(both) >= 18


@pytest.mark.slow
@pytest.mark.parametrize("network", ours.NETWORKS)
def test_the_simulation_agrees_with_its_closed_form(network: str) -> None:
    made = ours.program(network)
    for config in ours.TARGETS:
        executable = ours.compiled(made, config)
        job, plan = describe(made, executable.steps, executable.target), executable.memory
        staging = {i for i, step in enumerate(job.steps) if step.op.name in plan.staged}
        timings = time_all(job, plan.off_chip | job.constants, staging)
        start = process_time()
        timeline = simulate(job, plan, timings)
        assert process_time() - start < 5
        formula = {s.op.name: sum(t.cycles for t in row) for s, row in zip(job.steps, timings, strict=True)}
        assert timeline.cycles == pytest.approx(sum(formula.values()), rel=0.01)
        for op in timeline.ops:
            assert 0.95 < op.cycles / formula[op.op] < 1.13, op.op
