"""Banks of the SRAM: cycles by hand where streams meet, against small steps of time, and maps that keep apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler import Executable, MemoryPlan, compile_model
from qatlib.compiler.banks import WEIGHTS, Stretch, bank_cycles
from qatlib.compiler.choose import make
from qatlib.compiler.lays import lays
from qatlib.compiler.perf import OpEstimate, estimate
from qatlib.compiler.placement import GREEDY
from qatlib.emulator import emulate
from tests.compiler.compiler_nets import Net, random_net, tiny

BANK, RATE, BUS = 2**19, 16, 32
MAP = 64 * 64 * 64
TWO: dict[str, Any] = {"count": 2, "bytes_per_cycle": RATE}
FAST: dict[str, Any] = {"sram.bytes": 2 * BANK, "vector_unit.elements_per_cycle.int8": 64}


def clamped(banks: dict[str, Any] | None = TWO, changes: dict[str, Any] | None = None) -> Executable:
    """One pass over a map of 256 KiB, which the SRAM holds up."""
    net = Net()
    target = tiny(FAST | ({"sram.banks": banks} if banks else {}) | (changes or {}))
    return compile_model(net.program(net.clamp(net.input((64, 64, 64)))), target)


def moved(executable: Executable, **offsets: int) -> MemoryPlan:
    places = {n: p.model_copy(update={"offset": offsets.get(n, p.offset)}) for n, p in executable.memory.places.items()}
    return executable.memory.model_copy(update={"places": places})


def only_row(executable: Executable, plan: MemoryPlan) -> OpEstimate:
    (row,) = estimate(executable.job, plan).rows
    return row


@pytest.mark.parametrize(
    ("source", "sink", "cycles"),
    [
        (0, BANK, MAP / RATE),  # each bank has one stream
        (0, MAP, 2 * MAP / RATE),  # both are in bank 0
        (BANK, BANK + MAP, 2 * MAP / RATE),
        (BANK - MAP // 2, BANK + MAP // 2, MAP / 2 / RATE + MAP / RATE),  # the first half of the way they are apart
    ],
)
def test_streams_in_one_bank_share_its_rate(source: int, sink: int, cycles: float) -> None:
    executable = clamped()
    row = only_row(executable, moved(executable, in0=source, clamp0=sink))
    assert row.sram_cycles == cycles
    assert row.bank_cycles == cycles - 2 * MAP / BUS
    assert row.bound == "sram"
    assert row.cycles == pytest.approx(cycles + row.launch_cycles, rel=0.04)


def test_what_a_bank_delays_is_waited_for_at_the_sram() -> None:
    executable = clamped()
    apart, together = (only_row(executable, moved(executable, in0=0, clamp0=at)) for at in (BANK, MAP))
    assert together.cycles - apart.cycles == pytest.approx(MAP / RATE, rel=0.02)
    assert together.stall_sram - apart.stall_sram == pytest.approx(MAP / RATE, rel=0.03)
    assert together.vector_cycles == apart.vector_cycles


def test_a_bank_alone_is_slower_than_the_bus() -> None:
    """What goes to the DRAM leaves one stream in the SRAM, which is in one bank at a time."""
    for banks, cycles in ((None, MAP / BUS), (TWO, MAP / RATE)):
        executable = clamped(banks, {"dram.bytes_per_s": 1e9})
        plan = executable.memory
        homes = {"in0": "sram", "clamp0": "dram"}
        places = {name: plan.places[name].model_copy(update={"arena": arena}) for name, arena in homes.items()}
        row = only_row(executable, plan.model_copy(update={"places": places}))
        assert row.sram_cycles == cycles


def test_interleaved_banks_are_as_wide_as_all_of_them() -> None:
    plain = clamped(None)
    for rate, cycles in ((RATE, 2 * MAP / BUS), (RATE / 2, 2 * MAP / RATE)):
        banks = {"count": 2, "bytes_per_cycle": rate, "interleave_bytes": 64}
        executable = clamped(banks)
        row = only_row(executable, moved(executable, in0=0, clamp0=MAP))
        assert row.sram_cycles == cycles
        assert row.bank_cycles == 0
        assert (row.cycles == plain.performance.rows[0].cycles) == (rate == RATE)


# -- the sum over banks ------------------------------------------------------------------------------------------------


def test_weights_are_taken_evenly_from_their_bytes() -> None:
    target = tiny({"sram.bytes": 2 * BANK, "sram.banks": TWO})
    # three quarters of the weights lie in bank 0, as does the map for its whole length
    lay = (("x", (Stretch(0, 4096),)), (WEIGHTS, (Stretch(BANK - 3072, 4096, False),)))
    assert bank_cycles(target, {"x": 6400, WEIGHTS: 1600}, lay) == (6400 + 1200) / RATE
    # a slice in each bank
    lay = (("x", (Stretch(0, 4096),)), (WEIGHTS, (Stretch(4096, 512, False), Stretch(BANK, 512, False))))
    assert bank_cycles(target, {"x": 6400, WEIGHTS: 1600}, lay) == (6400 + 800) / RATE
    assert bank_cycles(target, {"x": 6400, WEIGHTS: 1600}, None) == 6400 / RATE
    assert bank_cycles(tiny(), {"x": 6400}, None) == 0


spans = st.tuples(st.integers(1, 9999), st.integers(0, 60), st.integers(1, 64), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(spans, min_size=1, max_size=4))
def test_it_is_what_small_steps_of_time_say(streams: list[tuple[int, int, int, bool]]) -> None:
    count, bank, steps = 8, 1024, 512
    target = tiny({"sram.bytes": count * bank, "sram.banks": {"count": count, "bytes_per_cycle": RATE}})
    lay = tuple(
        (str(i), (Stretch(at * 64, min(size, 128 - at) * 64, swept),)) for i, (_, at, size, swept) in enumerate(streams)
    )
    total = 0.0
    for step in range(steps):
        loads = [0.0] * count
        for (_, (one,)), (amount, *_) in zip(lay, streams, strict=True):
            line = one.size // 64  # of 64 bytes, each in one bank
            for k in [int((step + 0.5) / steps * line)] if one.swept else range(line):
                loads[(one.offset + 64 * k) // bank] += amount / steps / (1 if one.swept else line)
        total += max(loads) / RATE
    amounts = {str(i): float(amount) for i, (amount, *_) in enumerate(streams)}
    assert bank_cycles(target, amounts, lay) == pytest.approx(total, rel=0.02, abs=1)


def test_rows_and_second_factors_are_streams_too() -> None:
    net = Net()
    x = net.conv(net.input((16, 32, 32)), 32)
    net_out = net.conv(x, 16)
    banks = {"count": 4, "bytes_per_cycle": RATE}
    executable = compile_model(net.program(net_out), tiny({"sram.bytes": 32768, "sram.banks": banks}))
    plan = executable.memory
    assert plan.places["conv0"].arena == "rows"
    first, second = (dict(lay or ()) for lay in lays(executable.job, plan))
    (rows,) = (one for one in plan.scratch if one.use == "rows")
    assert first["conv0"] == second["conv0"] == (Stretch(rows.offset, rows.size, False),)
    staged = {one.op for one in plan.scratch if one.use == "weights"}
    assert (WEIGHTS in first, WEIGHTS in second) == ("conv0" in staged, "conv1" in staged)


# -- places ------------------------------------------------------------------------------------------------------------


def test_maps_of_one_op_lie_in_different_banks_where_those_are_free() -> None:
    executable = clamped()
    places = executable.memory.places
    assert {places[name].offset // BANK for name in ("in0", "clamp0")} == {0, 1}
    greedy = make(executable.job, GREEDY)
    assert {greedy.memory.places[name].offset // BANK for name in ("in0", "clamp0")} == {0}
    assert executable.performance.cycles < 0.6 * greedy.cycles


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_banks(seed: int) -> None:
    net, program = random_net(seed, 10)
    banks = {"count": 4, "bytes_per_cycle": 8}
    executable = compile_model(program, tiny({"sram.bytes": 2048, "sram.banks": banks}))
    plain = compile_model(program, tiny({"sram.bytes": 2048}))
    assert executable.performance.cycles >= plain.performance.cycles
    feed = net.feed(2)
    for seen, expected in zip(executable.run(*feed), emulate(program, feed), strict=True):
        assert torch.equal(seen, expected)


def test_a_saved_executable_has_the_same_estimate(tmp_path: Path) -> None:
    _, program = random_net(1, 10)
    unit = {"lookups_per_cycle": {"int8": 1.5}, "ports": 2, "beside_vector_unit": True}
    banks = {"count": 4, "bytes_per_cycle": 8}
    executable = compile_model(program, tiny({"sram.bytes": 2048, "sram.banks": banks, "table_unit": unit}))
    assert any(row.bank_cycles for row in executable.performance.rows)
    executable.save(tmp_path / "compiled")
    assert Executable.load(tmp_path / "compiled").performance == executable.performance


def test_a_map_of_which_an_edited_plan_leaves_out_the_filling_is_read(tmp_path: Path) -> None:
    """4 channels in bricks of 16, at the end of the SRAM without the 12 that fill them up."""
    net = Net()
    program = net.program(net.clamp(net.clamp(net.conv(net.input((4, 8, 8)), 4))))
    compile_model(program, tiny({"brick_channels": 16, "sram.bytes": 16384, "sram.banks": TWO})).save(tmp_path / "out")
    path = tmp_path / "out" / "executable.json"
    document = json.loads(path.read_text())
    for name in ("conv0", "clamp1"):
        document["memory"]["places"][name] |= {"offset": 16384 - 256, "size": 256}
    document["memory"]["sram"]["peak_bytes"] = 16384
    path.write_text(json.dumps(document))
    executable = Executable.load(tmp_path / "out")
    feed = net.feed(1)
    for seen, expected in zip(executable.run(*feed), emulate(program, feed), strict=True):
        assert torch.equal(seen, expected)
