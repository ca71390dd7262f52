"""A ``cat`` that changes no code: its operands are written in its place, and it has nothing left to do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler import Executable, compile_model
from qatlib.compiler.machine import Machine
from qatlib.emulator import emulate
from qatlib.program import Program
from tests.compiler.compiler_nets import Net, tiny


class JoiningNet(Net):
    def join(self, *xs: str, axis: int = 1, scales: Sequence[int] | None = None, lo: int = -128) -> str:
        """A cat whose operand i is multiplied by ``scales[i]`` / 2^20; of none by 1."""
        shape = list(self.shape(xs[0]))
        shape[axis] = sum(self.shape(x)[axis] for x in xs)
        multiplier = torch.tensor(list(scales or [1 << 20] * len(xs))).int()
        shift = torch.full((len(xs),), 20).int()
        attrs = {"axis": axis, "lo": lo, "hi": 127}
        return self.op("cat", xs, shape, "int8", attrs, multiplier=multiplier, shift=shift)


def run_equal(net: Net, program: Program, executable: Executable, batch: int = 3) -> None:
    inputs = net.feed(batch)
    for ours, theirs in zip(executable.run(*inputs), emulate(program, inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sram", [65536, 64])
def test_operands_are_written_in_the_place_of_the_result(sram: int) -> None:
    net = JoiningNet()
    x = net.input((4, 8, 8))
    parts = [net.conv(x, 4), net.conv(x, 8), net.conv(x, 4)]
    y = net.join(*parts)
    program = net.program(net.conv(y, 4))
    executable = compile_model(program, tiny({"sram.bytes": sram}))
    places = executable.memory.places
    assert executable.memory.joined == (y,)
    assert [places[part].offset - places[y].offset for part in parts] == [0, 4 * 64, 12 * 64]
    assert {places[part].buffer for part in parts} == {places[y].buffer}
    (row,) = (row for row in executable.performance.rows if row.op == y)
    assert (row.unit, row.cycles, row.sram_bytes, row.dram_bytes) == ("view", 0, 0, 0)
    run_equal(net, program, executable)


def test_rows_are_joined_too() -> None:
    net = JoiningNet()
    x = net.input((4, 8, 8))
    y = net.join(net.conv(x, 4), net.conv(x, 4), axis=2)
    program = net.program(net.conv(y, 4))
    executable = compile_model(program, tiny())
    assert executable.memory.joined == (y,)
    run_equal(net, program, executable)


def test_the_bytes_of_the_result_are_there_before_the_join() -> None:
    net = JoiningNet()
    x = net.input((4, 8, 8))
    parts = [net.conv(x, 4), net.conv(x, 8)]
    program = net.program(net.conv(net.join(*parts), 4))
    executable = compile_model(program, tiny())
    machine = Machine(program, executable.memory)
    codes = [torch.randint(-128, 128, (1, c, 8, 8), dtype=torch.int8) for c in (4, 8)]
    for name, values in zip(parts, codes, strict=True):
        machine.write(name, values)
    assert torch.equal(machine.read("cat2"), torch.cat(codes, 1))


def test_joined_bytes_live_from_the_first_operand_on() -> None:
    net = JoiningNet()
    x = net.input((4, 8, 8))
    first = net.conv(x, 4)
    other = net.conv(net.conv(x, 4), 4)  # made while the first waits
    program = net.program(net.conv(net.join(first, other), 4))
    executable = compile_model(program, tiny())
    places = executable.memory.places
    taken = range(places["cat3"].offset, places["cat3"].offset + 8 * 64)
    assert places["conv1"].offset not in taken or places["conv1"].arena != places["cat3"].arena
    run_equal(net, program, executable)


@pytest.mark.parametrize(
    "why", ["scale", "clamp", "needed later", "twice", "input", "alignment", "dtype"],
)  # fmt: skip
def test_what_has_to_be_copied_is_not_joined(why: str) -> None:
    net = JoiningNet()
    x = net.input((4, 8, 8))
    a, b = net.conv(x, 4), net.conv(x, 4)
    extra: tuple[str, ...] = ()
    if why == "scale":
        y = net.join(a, b, scales=[1 << 20, 3 << 18])
    elif why == "clamp":
        y = net.join(a, b, lo=0)
    elif why == "needed later":
        y = net.join(a, b)
        extra = (net.conv(a, 4),)
    elif why == "twice":
        y = net.join(a, a)
    elif why == "input":
        y = net.join(x, b)
    elif why == "alignment":
        odd = net.conv(net.pool("max_pool", net.pool("max_pool", x)), 3, 1)  # 3 x 2 x 2 bytes of lines of 16
        y = net.join(odd, net.conv(net.pool("max_pool", net.pool("max_pool", x)), 4, 1))
    else:
        wide = net.conv(x, 4, dtype="int16")
        y = net.join(wide, b, scales=[1 << 12, 1 << 20])
    program = net.program(net.conv(y, 4), *extra)
    executable = compile_model(program, tiny())
    assert executable.memory.joined == ()
    (row,) = (row for row in executable.performance.rows if row.op == y)
    assert row.sram_bytes > 0
    run_equal(net, program, executable)


def test_an_op_before_may_be_computed_in_place_and_joins_nest() -> None:
    net = JoiningNet()
    x = net.input((4, 8, 8))
    a = net.clamp(net.conv(x, 4))
    inner = net.join(a, net.conv(x, 4))
    y = net.join(inner, net.add(net.conv(x, 8), net.conv(x, 8)))
    program = net.program(net.conv(y, 4), net.conv(x, 4))
    executable = compile_model(program, tiny())
    assert executable.memory.joined == tuple(sorted((inner, y)))
    places = executable.memory.places
    assert places[a].offset == places[inner].offset == places[y].offset
    run_equal(net, program, executable)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([64, 1024, 2048, 65536]), st.sampled_from(["O0", "O1", "O2", "O3"]))
def test_joined_nets_run_as_the_emulator(seed: int, sram: int, opt: str) -> None:
    net = JoiningNet(seed)
    names = [net.input((4, 8, 8)), net.input((4, 8, 8))]
    draw = torch.Generator().manual_seed(seed)

    def one() -> str:
        return names[int(torch.randint(0, len(names), (), generator=draw))]

    for kind in torch.randint(0, 5, (7,), generator=draw).tolist():
        if kind == 0:
            names.append(net.conv(one(), 4))
        elif kind == 1:
            names.append(net.clamp(one()))
        elif kind == 2:
            names.append(net.join(one(), net.conv(one(), 4), axis=1))
        elif kind == 3:
            names.append(net.conv(net.join(net.conv(one(), 4), net.conv(one(), 4)), 8))
        else:
            names.append(net.clamp(net.join(net.conv(one(), 4), net.conv(one(), 4))))
    program = net.program(names[-1], *names[2:4])
    run_equal(net, program, compile_model(program, tiny({"sram.bytes": sram}), {"opt": opt}), 2)
