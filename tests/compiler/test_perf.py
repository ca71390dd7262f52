"""Estimates recomputed by hand on the target of compiler_nets.TINY."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

from qatlib.compiler import OpEstimate, compile_model, perf_model
from tests.compiler.compiler_nets import Net, residual, tiny


def only_row(net: Net, output: str, changes: dict[str, object] | None = None) -> OpEstimate:
    (row,) = (r for r in compile_model(net.program(output), tiny(changes)).performance.rows if r.op == output)
    return row


def test_tiny_convolution() -> None:
    net = Net()
    row = only_row(net, net.conv(net.input((3, 8, 8)), 8))
    assert (row.unit, row.block) == ("mac", "8x8x8")
    assert row.macs == 64 * 8 * 3 * 9 == 13824
    # 3 of 16 channels a step and 8 of 16 outputs side by side: 64 positions x 9 taps x 4 cycles
    assert row.mac_cycles == 64 * 9 * 4 == 2304
    assert row.vector_cycles == 8 * 64 // 8 == 64
    assert row.sram_bytes == 3 * 64 + 8 * 64 == 704
    assert row.sram_cycles == 704 // 32 == 22
    # the weights in lines of 16; bias, multiplier and shift
    assert (row.weight_bytes, row.dram_bytes) == (224, 224 + 8 * 12)
    assert row.dram_cycles == 320 // 4 == 80
    # one block: read, summed, and written while another would be; two are under way
    assert row.cycles == 192 // 32 + 512 // 32 + 2304 + (2304 + 64) // 2 + 5
    assert row.bound == "mac"
    assert row.utilization == pytest.approx(13824 / (row.cycles * 64))
    assert row.latency_us == row.cycles  # 1 MHz


def test_int16_steps_take_longer() -> None:
    net = Net()
    row = only_row(net, net.conv(net.input((16, 4, 4), "int16"), 16, 1))
    assert row.mac_cycles == 16 * 4 * 4
    assert row.sram_bytes == 16 * 16 * 2 + 16 * 16
    assert row.utilization == pytest.approx(4096 / (row.cycles * 16))


def test_depthwise_lies_side_by_side_on_the_outputs() -> None:
    net = Net()
    row = only_row(net, net.conv(net.input((24, 4, 4)), 24, groups=24))
    assert row.macs == 24 * 16 * 9
    assert row.mac_cycles == 16 * 2 * 9 * 4  # positions, 24 -> 2 x 16 outputs, taps, a step of one channel each


def test_groups_are_filled_one_by_one() -> None:
    net = Net()
    row = only_row(net, net.conv(net.input((8, 4, 4)), 12, 1, groups=2))
    assert row.mac_cycles == 2 * 16 * 4  # (4 -> 16) x (6 -> 16), twice, at 16 positions


def test_vector_unit_goes_by_the_widest_dtype() -> None:
    net = Net()
    a, b = net.input((4, 4, 4)), net.input((4, 4, 4), "int16")
    row = only_row(net, net.add(a, b))
    assert (row.unit, row.macs, row.utilization) == ("vector", 0, 0.0)
    assert row.vector_cycles == 64 // 4
    assert (row.dram_bytes, row.dram_cycles) == (12, 3)  # multipliers and shift
    assert row.sram_bytes == 64 + 128 + 64
    assert row.bound == "vector"


def test_an_operation_can_be_slower_than_the_rest() -> None:
    net = Net()
    y = net.add(net.input((4, 4, 4)), net.input((4, 4, 4)))
    assert only_row(net, y).vector_cycles == 64 // 8
    assert only_row(net, y, {"vector_unit.operations": {"add": 2.0}}).vector_cycles == 64 // 2


def test_an_add_of_its_own_reads_and_writes_the_map_again() -> None:
    net = Net()
    x = net.input((8, 8, 8))
    y = net.conv(x, 8, addend=x)
    fused, apart = only_row(net, y), only_row(net, y, {"vector_unit.second_operand": False})
    assert fused.sram_bytes == 3 * 512
    assert apart.sram_bytes == 2 * 512 + 3 * 512
    assert apart.cycles > fused.cycles
    assert (apart.macs, apart.mac_cycles) == (fused.macs, fused.mac_cycles)


def test_memory_bounds() -> None:
    net = Net()
    assert only_row(net, net.linear(net.input((256,)), 64), {"dram.bytes_per_s": 1.0e6}).bound == "dram"
    net = Net()
    y = net.clamp(net.input((4, 8, 8)))
    row = only_row(net, y, {"sram.bytes_per_cycle": 1, "dram.bytes_per_s": 0.5e6})
    assert (row.bound, row.cycles) == ("sram", 512 + 5)
    assert only_row(net, y, {"launch_cycles": 999}).bound == "launch"


def test_spilled_activations_are_dram_traffic() -> None:
    net = Net()
    x = net.input((1, 8, 8))
    big = net.clamp(x)
    y = net.clamp(big)
    fits = compile_model(net.program(y), tiny({"sram.bytes": 128})).performance
    assert fits.dram_bytes == 0
    executable = compile_model(net.program(y), tiny({"sram.bytes": 64}))
    assert executable.memory.spilled == (y, x)  # big is written and read, these are one of both
    rows = executable.performance.rows
    assert [(r.sram_bytes, r.dram_bytes) for r in rows] == [(64, 64), (64, 64)]
    assert rows[0].dram_cycles == 16


def test_totals_and_free_steps() -> None:
    _, program = residual()
    executable = compile_model(program, tiny())
    perf = perf_model(executable)
    by_unit = {r.op: r.unit for r in perf.rows}
    assert by_unit["quantize0"] == by_unit["dequantize7"] == "host"
    assert by_unit["reshape5"] == "view"
    assert all(r.cycles == 0 for r in perf.rows if r.unit in ("host", "view"))
    assert perf.cycles == sum(r.cycles for r in perf.rows)
    assert perf.latency_us == perf.cycles
    assert perf.fps == pytest.approx(1e6 / perf.latency_us)
    assert perf.macs == 64 * 8 * 27 + 2 * 64 * 8 * 72 + 5 * 32
    weights = (8 * 27, 8 * 72, 8 * 72, 5 * 32)
    assert perf.dram_bytes == sum(-(-n // 16) * 16 for n in weights) + 12 * (8 + 8 + 8 + 5) + 8  # and of the pool
    assert sum(perf.cycles_by_bound().values()) == perf.cycles
    assert perf.utilization == pytest.approx(perf.macs / (perf.cycles * 64))


def test_document_is_sorted_json_and_says_estimate() -> None:
    perf = compile_model(residual()[1], tiny()).performance
    document = perf.to_dict()
    assert json.dumps(document) == json.dumps(document, sort_keys=True, allow_nan=False)
    assert "estimate" in document["basis"]
    assert document["source"] == "test"
    frame = perf.to_frame()
    assert list(frame["op"]) == [r.op for r in perf.rows]
    assert frame["cycles"].sum() == perf.cycles


def test_nothing_for_the_accelerator_to_do() -> None:
    net = Net()
    perf = compile_model(net.program(net.dequantize(net.quantize(net.input((4,), "float32")))), tiny()).performance
    assert (perf.cycles, perf.fps, perf.utilization) == (0, None, 0.0)
    json.dumps(perf.to_dict(), allow_nan=False)


def test_the_table_is_written_row_by_row(tmp_path: Path) -> None:
    perf = compile_model(residual()[1], tiny()).performance
    perf.write_csv(tmp_path / "performance.csv")
    frame = pandas.read_csv(tmp_path / "performance.csv", keep_default_na=False)
    assert list(frame["op"]) == [row.op for row in perf.rows]
    assert frame["cycles"].sum() == perf.cycles
    assert frame["host_bytes"].sum() == 3 * 64 * (4 + 1) + 5 * (4 + 4)  # what is quantized, and what is dequantized


def test_compute_and_traffic_in_time_and_share() -> None:
    net = Net()
    row = only_row(net, net.conv(net.input((3, 8, 8)), 8))
    assert (row.compute_us, row.load_store_us) == (2304, 80)  # of the array at 1 MHz, of the DRAM
    assert row.compute_share == pytest.approx(2304 / row.cycles)
    assert row.load_store_share == pytest.approx(80 / row.cycles)
    waits = row.stall_compute + row.stall_sram + row.stall_dram + row.stall_weights + row.stall_dependency
    assert 2304 + waits + 5 == pytest.approx(row.cycles, abs=2)
    assert row.start_us == 0


def test_what_int16_costs_is_the_difference_to_the_same_op_in_int8() -> None:
    def rows(dtype: str) -> list[OpEstimate]:
        net = Net()
        x = net.input((16, 8, 8), dtype)
        return list(compile_model(net.program(net.clamp(net.conv(x, 16, dtype=dtype))), tiny()).performance.rows)

    wide, narrow = rows("int16"), rows("int8")
    for a, b in zip(wide, narrow, strict=True):
        assert a.int16_cycles == a.cycles - b.cycles > 0
        assert b.int16_cycles == 0


def test_memory_that_is_taken_and_traffic_a_second() -> None:
    executable = compile_model(residual()[1], tiny())
    perf, plan = executable.performance, executable.memory
    assert (perf.static_bytes, perf.sram_peak_bytes, perf.dram_peak_bytes) == (
        plan.weight_bytes, plan.sram.peak_bytes, plan.dram.peak_bytes,
    )  # fmt: skip
    assert max(row.sram_live_bytes for row in perf.rows) == plan.sram.live_bytes
    assert perf.dram_bytes_per_s == pytest.approx(perf.dram_bytes / (perf.latency_us * 1e-6))
    document = perf.to_dict()
    assert [row["unit"] for row in document["units"]] == ["array", "vector", "dma", "sram", "dram"]
    for row in document["units"]:
        unit = row.pop("unit")
        assert sum(row.values()) == pytest.approx(perf.cycles, abs=10)
        shares = [part[unit] for part in document["intervals"]]
        assert max(shares) <= 1
        assert sum(shares) / len(shares) * perf.cycles == pytest.approx(row["busy"], rel=0.01, abs=5)
