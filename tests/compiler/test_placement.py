"""What the SRAM holds: cascades, staged weights, the maps that are dear off chip."""

from __future__ import annotations

import torch

from qatlib.compiler import Executable, Target, compile_model, load_target
from qatlib.compiler.job import describe
from qatlib.compiler.lifetimes import lifetimes
from qatlib.compiler.placement import place, rolling_bytes
from qatlib.compiler.steps import order_steps
from qatlib.emulator import emulate
from qatlib.program import Program
from tests.compiler.compiler_nets import Net, tiny


def placed(program: Program, target: Target):  # type: ignore[no-untyped-def]
    job = describe(program, order_steps(program), target)
    return job, place(job, lifetimes(job))


def chain(readers: int = 1) -> tuple[Net, Program]:
    """Three convolutions on a map of 4 x 16 x 16; the second map is read by the third alone or by others as well."""
    net = Net()
    x = net.conv(net.input((4, 16, 16)), 4)
    y = net.conv(x, 4)
    z = net.conv(y, 4)
    return net, net.program(z, *(net.conv(y, 4) for _ in range(readers - 1)))


def arenas(executable: Executable) -> dict[str, str]:
    return {name: place.arena for name, place in executable.memory.places.items()}


def test_maps_that_do_not_fit_together_pass_row_by_row() -> None:
    net, program = chain()
    roomy, tight = compile_model(program, tiny()), compile_model(program, tiny({"sram.bytes": 1536}))
    assert set(arenas(roomy).values()) == {"sram"}
    assert arenas(tight) == {"in0": "dram", "conv0": "rows", "conv1": "rows", "conv2": "dram"}
    rows = [scratch for scratch in tight.memory.scratch if scratch.use == "rows"]
    # 3 rows for one output, 1 more for the next, 2 that are written meanwhile: 6 of 16 rows of 64 bytes, twice
    assert [(s.op, s.size, s.first, s.last) for s in rows] == [("conv0", 2 * 6 * 64, 0, 2)]
    assert tight.memory.sram.peak_bytes <= 1536
    inputs = net.feed(3)
    assert torch.equal(tight.run(*inputs)[0], emulate(program, inputs)[0])
    # nothing of the maps in between crosses the bus of the DRAM
    off = {row.op: row.dram_bytes for row in tight.performance.rows}
    inside = {row.op: row.dram_bytes for row in roomy.performance.rows}
    assert off["conv1"] == inside["conv1"]
    assert off["conv0"] > inside["conv0"]


def test_what_several_ops_read_does_not_pass_row_by_row() -> None:
    _, program = chain(readers=2)
    _, found = placed(program, tiny({"sram.bytes": 1536}))
    assert [cascade.values for cascade in found.cascades] == [("conv0",)]


def test_rows_in_use_are_those_of_the_window() -> None:
    job, _ = placed(chain()[1], tiny())
    (task,) = job.passes[1]
    assert rolling_bytes(task, job) == (1 + 3 + 2) * 16 * 4


def test_weights_that_are_read_again_are_staged_in_slices() -> None:
    net = Net()
    x = net.conv(net.input((64, 28, 28)), 64, 1)
    y = net.conv(x, 256)
    executable = compile_model(net.program(net.conv(y, 16, 1)), load_target("ethos-u55-256-like"))
    slices = [scratch for scratch in executable.memory.scratch if scratch.op == y]
    (row,) = (row for row in executable.performance.rows if row.op == y)
    assert executable.memory.staged >= {y}
    assert next((s.use, s.first, s.last) for s in slices) == ("weights", 0, 1)  # the first comes under the op before
    assert 0 < sum(s.size for s in slices) < row.weight_bytes + 10 * 256 + 2 * 16


def test_weights_that_find_no_place_are_read_again_from_off_chip() -> None:
    net = Net()
    y = net.conv(net.input((64, 28, 28)), 64)
    program, target = net.program(y), load_target("ethos-u55-256-like")
    small = target.model_copy(update={"sram": target.sram.model_copy(update={"bytes": 1024})})
    roomy, tight = compile_model(program, target), compile_model(program, small)
    assert roomy.memory.staged == {y}
    assert tight.memory.staged == frozenset()
    (before,), (after,) = roomy.performance.rows, tight.performance.rows
    assert after.dram_bytes - before.dram_bytes >= before.weight_bytes


def test_inputs_and_results_stay_off_chip_where_the_sram_may_not_hold_them() -> None:
    _, program = chain()
    found = arenas(compile_model(program, tiny({"sram.holds_boundary": False})))
    assert found == {"in0": "dram", "conv0": "sram", "conv1": "sram", "conv2": "dram"}


def test_the_dearest_map_stays() -> None:
    net = Net()
    x = net.conv(net.input((4, 16, 16)), 4, 1)
    often = net.clamp(x)
    reads = [net.conv(often, 4) for _ in range(3)]
    total = net.add(net.add(reads[0], reads[1]), reads[2])
    program = net.program(net.conv(total, 1, 1))
    executable = compile_model(program, tiny({"sram.bytes": 2048, "sram.holds_boundary": False}))
    assert executable.memory.places[often].arena == "sram"  # three times read, block by block
    assert any(place.arena == "dram" for name, place in executable.memory.places.items() if name in reads)


def test_what_a_cascade_reads_and_writes_lives_together() -> None:
    """Its ops run row by row: the last one writes while the first still reads."""
    _, program = chain()
    job = describe(program, order_steps(program), tiny())
    apart = {b.name: (b.start, b.end) for b in lifetimes(job)}
    assert apart == {"in0": (-1, 0), "conv0": (0, 1), "conv1": (1, 2), "conv2": (2, 3)}
    found = {b.name: (b.start, b.end) for b in lifetimes(job, rows={"conv0", "conv1"})}
    assert (found["in0"], found["conv2"]) == ((-1, 2), (0, 3))


def test_rows_lie_in_no_other_map() -> None:
    """The sum could be computed in the place of its addend, if it were held whole."""
    net = Net()
    addend = net.conv(net.input((4, 32, 8)), 4)
    total = net.conv(net.input((4, 32, 8)), 4, addend=addend)
    program = net.program(net.conv(total, 4))
    job = describe(program, order_steps(program), tiny())
    together = {b.name: b.values for b in lifetimes(job, frozenset())}
    assert together[addend] == (addend, total)
    alone = {b.name: b.values for b in lifetimes(job, frozenset(), rows={total})}
    assert alone[addend] == (addend,)
    assert alone[total] == (total,)


def test_only_maps_of_one_shape_and_width_are_written_over() -> None:
    net = Net()
    wide = net.conv(net.input((4, 8, 8)), 4, dtype="int16")
    program = net.program(net.conv(net.add(wide, wide, "int8"), 4))
    job = describe(program, order_steps(program), tiny())
    assert all(len(buffer.values) == 1 for buffer in lifetimes(job, frozenset()))
