"""Memory plans: optima known by hand, and properties that hold for all plans."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler.job import describe
from qatlib.compiler.lifetimes import Buffer, lifetimes
from qatlib.compiler.memory import misfit, pack, plan_memory
from qatlib.compiler.steps import Step, order_steps
from qatlib.compiler.target import Target
from qatlib.program import Program
from tests.compiler.compiler_nets import Net, random_net, residual, tiny


def plan(program: Program, target: Target):  # type: ignore[no-untyped-def]
    return plan_memory(program, order_steps(program), target)


def test_chain_alternates_between_two_ends() -> None:
    net = Net()
    x = net.input((1, 8, 8))  # 64 bytes
    b = net.conv(x, 2)  # 128
    c = net.conv(b, 1)  # 64
    d = net.conv(c, 1)  # 64
    found = plan(net.program(d), tiny())
    # b first at 0; x and c meet b and go above it; d meets c only and returns to the bottom.
    assert {name: place.offset for name, place in found.places.items()} == {x: 128, b: 0, c: 128, d: 0}
    assert found.sram.peak_bytes == found.sram.live_bytes == 192
    assert found.sram.fragmentation == 0
    assert found.spilled == ()


def test_residual_keeps_the_skip_alive() -> None:
    net = Net()
    x = net.input((1, 8, 8))
    skip = net.conv(x, 1)
    y = net.conv(skip, 1)
    out = net.add(y, skip)
    found = plan(net.program(out), tiny())
    assert found.sram.peak_bytes == found.sram.live_bytes == 3 * 64
    assert len({found.places[n].offset for n in (skip, y, out)}) == 3
    assert found.places[x].offset == found.places[y].offset


def test_lifetimes_by_hand() -> None:
    _, program = residual()
    steps = order_steps(program)
    kinds = [step.op.kind for step in steps]
    assert kinds == ["quantize", "conv", "conv", "conv", "avg_pool", "reshape", "linear", "dequantize"]
    assert [step.unit for step in steps] == ["host"] + ["npu"] * 6 + ["host"]
    spans = {
        buffer.name: (buffer.start, buffer.end, buffer.size) for buffer in lifetimes(describe(program, steps, tiny()))
    }
    assert spans == {
        "quantize0": (0, 1, 192),
        "conv1": (1, 3, 512),
        "conv2": (2, 3, 512),
        "conv3": (3, 4, 512),
        "avg_pool4": (4, 6, 32),
        "linear6": (6, 7, 32),  # 5 x int32 = 20 bytes in lines of 16
    }


def test_inputs_live_from_the_start_and_outputs_to_the_end() -> None:
    net = Net()
    first, second = net.input((1, 4, 4)), net.input((1, 4, 4))
    early = net.clamp(first)
    late = net.add(second, net.clamp(early))
    program = net.program(early, late)
    spans = {b.name: (b.start, b.end) for b in lifetimes(describe(program, order_steps(program), tiny()))}
    assert spans[second] == (-1, 2)
    assert spans[early] == (0, 3)
    assert spans[late] == (2, 3)


def test_host_quantize_runs_first_wherever_it_stands() -> None:
    net = Net()
    a, b = net.input((1, 4, 4), "float32"), net.input((1, 4, 4), "float32")
    x = net.clamp(net.quantize(a))
    early = net.dequantize(x)
    y = net.add(x, net.quantize(b))
    program = net.program(early, net.dequantize(y))
    kinds = [step.op.kind for step in order_steps(program)]
    assert kinds == ["quantize", "quantize", "clamp", "add", "dequantize", "dequantize"]


def test_reshape_shares_the_bytes_of_its_input() -> None:
    net = Net()
    x = net.clamp(net.input((4, 4, 4)))
    flat = net.reshape(x, 64)
    again = net.reshape(flat, 8, 8)
    found = plan(net.program(net.linear(again, 8), x), tiny())
    assert found.places[x] == found.places[flat] == found.places[again]
    assert found.shares_bytes(x, again)


def test_smallest_gap_that_holds_it_is_taken() -> None:
    early = [Buffer("a", (), 0, 0, 30), Buffer("c", (), 0, 0, 26)]
    long = [Buffer("b", (), 0, 9, 28), Buffer("d", (), 0, 9, 24)]
    late = Buffer("x", (), 5, 9, 20)
    # At steps 5 to 9 the places of a (0 to 30) and of c (58 to 84) are free: c's is the tighter one.
    offsets, left = pack([*early, *long, late], None)
    assert offsets == {"a": 0, "b": 30, "c": 58, "d": 84, "x": 58}
    assert left == ()


def test_what_costs_the_most_off_chip_stays() -> None:
    net = Net()
    x = net.input((1, 8, 8))  # 64
    big = net.clamp(net.conv(x, 4))  # 256, in the place of the convolution's
    small = net.conv(big, 2)  # 128
    program = net.program(small, net.conv(big, 2))
    found = plan(program, tiny({"sram.bytes": 320}))
    first = program.ops[0].output
    # big is written once and read twice; x and one of the results fit beside it
    assert found.places[big].arena == found.places[first].arena == "sram"
    assert found.places[big].buffer == found.places[first].buffer
    assert found.sram.peak_bytes <= 320
    assert found.spilled
    assert not {big, first} & {*found.spilled}
    assert plan(program, tiny({"sram.bytes": 16})).spilled == tuple(sorted(found.places))


def test_a_result_takes_the_place_of_an_operand_that_nothing_needs_later() -> None:
    net = Net()
    skip = net.conv(net.input((1, 8, 8)), 1)
    y = net.conv(skip, 1)
    both = net.add(y, skip)
    again = net.add(both, skip)
    later = net.clamp(again)
    found = plan(net.program(net.conv(later, 1)), tiny())
    assert found.shares_bytes(y, both)
    assert found.shares_bytes(both, again)  # the first of both, which die there
    assert found.shares_bytes(again, later)
    assert not found.shares_bytes(skip, both)


def test_weights_are_counted_once_in_their_own_width() -> None:
    net = Net()
    y = net.conv(net.input((3, 4, 4)), 8)
    assert plan(net.program(y), tiny()).weight_bytes == 8 * 3 * 9 + 8 * 4 + 8 * 4 + 8 * 4


spans = st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 40))


@settings(max_examples=300, deadline=None)
@given(st.lists(spans, min_size=1, max_size=14), st.one_of(st.none(), st.integers(1, 1500)))
def test_packing_never_overlaps_live_buffers(drawn: list[tuple[int, int, int]], capacity: int | None) -> None:
    buffers = [Buffer(f"b{i}", (), s, s + n, 16 * k) for i, (s, n, k) in enumerate(drawn)]
    offsets, left = pack(buffers, capacity)
    assert sorted([*offsets, *(b.name for b in left)]) == sorted(b.name for b in buffers)
    assert not left or capacity is not None
    inside = [b for b in buffers if b.name in offsets]
    live = [0] * 20
    for i, b in enumerate(inside):
        assert offsets[b.name] % 16 == 0
        assert capacity is None or offsets[b.name] + b.size <= capacity
        for step in range(b.start, b.end + 1):
            live[step] += b.size
        for other in inside[:i]:
            together = set(range(b.start, b.end + 1)) & set(range(other.start, other.end + 1))
            low, high = max(offsets[b.name], offsets[other.name]), min(
                offsets[b.name] + b.size, offsets[other.name] + other.size
            )  # fmt: skip
            assert not together or low >= high
    if inside:
        assert max(offsets[b.name] + b.size for b in inside) >= max(live)
    for b in left:
        assert capacity is not None
        assert b.size > capacity or inside
    assert pack(list(reversed(buffers)), capacity) == (offsets, left)


def live_after(program: Program, steps: tuple[Step, ...], index: int) -> set[str]:
    """Values that exist after step ``index`` and are still wanted, straight from the definition."""
    made = {*program.inputs, *(s.op.output for s in steps[: index + 1])}
    wanted = {*program.outputs, *(n for s in steps[index + 1 :] for n in s.op.inputs)}
    return {name for name in made & wanted if not program.values[name].qtype.is_float}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([16, 512, 1024, 4096, 65536]))
def test_no_two_live_values_of_a_program_overlap(seed: int, length: int, sram: int) -> None:
    _, program = random_net(seed, length)
    target = tiny({"sram.bytes": sram})
    steps = order_steps(program)
    found = plan_memory(program, steps, target)
    assert misfit(found, program, steps, target) == ""
    source = {s.op.output: s.op.inputs[0] for s in steps if s.op.kind == "reshape"}

    def root(name: str) -> str:
        return root(source[name]) if name in source else name

    def in_place(a: str, b: str, index: int) -> bool:
        """Whether step ``index`` may write ``a`` over ``b``: element by element, and nothing needs ``b`` later."""
        op = steps[index].op
        operands = op.inputs if op.kind in ("add", "clamp") else op.inputs[1:] if op.kind == "conv" else ()
        needed = {*live_after(program, steps, index), *(op.inputs[:1] if op.kind == "conv" else ())}
        return a == op.output and root(b) in map(root, operands) and root(b) not in map(root, needed)

    def clear(names: set[str], index: int) -> None:
        for a in names:
            for b in names:
                p, q = found.places[a], found.places[b]
                apart = root(a) != root(b) and not in_place(a, b, index) and not in_place(b, a, index)
                if apart and p.arena == q.arena:
                    assert p.offset + p.bytes <= q.offset or q.offset + q.bytes <= p.offset, (a, b)

    for index, step in enumerate(steps):
        live = live_after(program, steps, index)
        clear(live, index)
        names = {*step.op.inputs, step.op.output}
        clear(live | {n for n in names if not program.values[n].qtype.is_float}, index)
        held = [s for s in found.scratch if s.first <= index <= s.last]
        here = [found.places[n] for n in live if found.places[n].arena == "sram"]
        for i, s in enumerate(held):
            for other in (*held[:i], *here):
                assert s.offset + s.size <= other.offset or other.offset + other.size <= s.offset
    for place in found.places.values():
        assert place.offset % target.sram.alignment == 0
    assert found.sram.peak_bytes <= sram
    for use in (found.sram, found.dram, found.unlimited):
        assert use.peak_bytes >= use.live_bytes
        assert 0 <= use.fragmentation < 1
    if found.unlimited.peak_bytes <= sram:
        assert found.spilled == ()
