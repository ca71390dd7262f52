"""Tiled = untiled: what a compiled Program computes box by box and row by row is what the emulator computes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatlib.compiler import Executable, Target, compile_model, load_target
from qatlib.emulator import emulate
from tests.compiler.compiler_nets import KINDS, Net, random_net, tiny
from tests.kind_nets import NETS

ALL = {kind: {"inputs": ["int8", "int16"], "outputs": ["int8", "int16"]} for kind in (*KINDS, "conv_transpose")}


def same(executable: Executable, inputs: Sequence[Tensor]) -> None:
    program = executable.program
    for name, ours, theirs in zip(program.outputs, executable.run(*inputs), emulate(program, inputs), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert int((ours != theirs).sum()) == 0, name


def small_core(target: Target, block: Sequence[int]) -> Target:
    """The target with blocks of at most ``block``, and buffers that hold few of them."""
    buffers = target.buffers.model_copy(
        update={"max_block": tuple(block), "shared_bytes": None, "input_bytes": 8192, "accumulator_bytes": 2048}
    )
    return target.model_copy(update={"buffers": buffers})


# -- every kind, random nets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 1, 16), (3, 2, 16), (2, 8, 32)])
@pytest.mark.parametrize("name", NETS)
def test_every_kind_in_small_blocks(name: str, block: tuple[int, int, int]) -> None:
    net = NETS[name]
    executable = compile_model(net.program(), small_core(load_target("bayes-like"), block))
    same(executable, tuple(x[:2] for x in net.inputs))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 12),
    sram=st.sampled_from([16, 256, 512, 1024, 4096, 65536]),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
)
def test_random_nets_in_random_blocks(seed: int, length: int, sram: int, block: tuple[int, int], batch: int) -> None:
    net, program = random_net(seed, length)
    target = small_core(tiny({"sram.bytes": sram}), (*block, 16))
    same(compile_model(program, target), net.feed(batch))


@pytest.mark.parametrize("groups", [1, 2, 3, 24])
def test_staged_weights_of_groups(groups: int) -> None:
    net = Net(groups)
    program = net.program(net.conv(net.input((24, 9, 9)), 48, groups=groups))
    target = small_core(tiny({"dram.bytes_per_s": 1.0e5, "buffers.block_channels": 4}), (4, 4, 8))
    executable = compile_model(program, target)
    (pieces,) = executable._layout.slices.values()
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, 48)
    same(executable, net.feed(2))


# -- windows -----------------------------------------------------------------------------------------------------------


def window_op(net: Net, draw: Any, x: str, kinds: Sequence[str], axes: int) -> str:
    """A convolution or pool of random kernel, stride, dilation, padding, groups on ``x``; ``x`` if it is too large."""
    kind = draw(st.sampled_from(kinds))
    _, channels, *sizes = net.shape(x)
    spatial = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, stride, dilation = draw(spatial), draw(spatial), draw(spatial)
    padding = [[draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))] for k in kernel]
    if kind == "avg_pool":
        dilation = [1] * axes
    if kind == "max_pool":  # no window of padding alone: it has no largest element
        padding = [pair if d == 1 else [0, 0] for pair, d in zip(padding, dilation, strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if kind == "conv_transpose":
        padding = [[min(side, r - 1) for side in pair] for pair, r in zip(padding, reach, strict=True)]
        out = [(n - 1) * s + r - sum(p) for n, s, r, p in zip(sizes, stride, reach, padding, strict=True)]
    else:
        out = [(n + sum(p) - r) // s + 1 for n, s, r, p in zip(sizes, stride, reach, padding, strict=True)]
    if min(out) < 1 or max(out) > 60:
        return x
    attrs: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    if kind in ("max_pool", "avg_pool"):
        attrs |= {"kernel": kernel}
        shape = (-1, channels, *out)
        if kind == "max_pool":
            return net.op(kind, [x], shape, "int8", attrs)
        del attrs["dilation"]
        return net._rescaled(kind, [x], shape, "int8", attrs, 1, 1)
    groups = draw(st.sampled_from([n for n in (1, 2, channels) if channels % n == 0]))
    outs = groups * draw(st.integers(1, 3))
    weight = (outs, channels // groups, *kernel)
    return net._dense(kind, x, weight, (-1, outs, *out), "int8", attrs | {"groups": groups}, None, 20)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_windows(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    net = Net(data.draw(st.integers(0, 99)))
    x = net.input(
        (data.draw(st.sampled_from([1, 4, 6])), *data.draw(st.lists(st.integers(4, 9), min_size=axes, max_size=axes)))
    )
    y = window_op(net, data.draw, x, ("conv", "max_pool", "avg_pool", "conv_transpose"), axes)
    block = (*data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), data.draw(st.sampled_from([1, 2, 16])))
    target = small_core(tiny({"ops": ALL, "buffers.block_channels": 1, "mac_array.tiles": [[1, 1, 1]]}), block)
    if y != x:
        same(compile_model(net.program(y), target), net.feed(2))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_cascades(data: st.DataObject) -> None:
    """Chains whose maps do not fit the SRAM pass row by row through as many rows as are planned."""
    net = Net(data.draw(st.integers(0, 99)))
    x = y = net.conv(net.input((2, data.draw(st.integers(24, 60)), data.draw(st.integers(3, 6)))), 4)
    for _ in range(data.draw(st.integers(1, 5))):
        y = window_op(net, data.draw, y, ("conv", "max_pool", "avg_pool", "conv_transpose"), 2)
    if y != x:
        sram = data.draw(st.sampled_from([384, 512, 768, 1024, 1536]))
        target = tiny({"ops": ALL, "sram.bytes": sram, "buffers.block_channels": 1})
        executable = compile_model(net.program(y), target)
        rows = [one for one in executable.memory.scratch if one.use == "rows"]
        event(f"longest cascade {max((one.last - one.first for one in rows), default=0)}")
        same(executable, net.feed(data.draw(st.integers(1, 2))))


@pytest.mark.parametrize(
    ("room", "columns"), [(8192, 8), (16 * 9, 8), (16 * 9 - 1, 4), (16 * 6, 4), (16 * 4, 2), (16 * 3, 1)]
)
def test_rows_are_cut_where_the_buffers_have_no_room(room: int, columns: int) -> None:
    """For two rows of 3 by 3 windows over 2 channels there are 16 bytes for a column in the two buffers of inputs."""
    net = Net()
    middle = net.conv(net.input((2, 40, 16)), 4)
    program = net.program(net.conv(middle, 4, 1))
    executable = compile_model(program, tiny({"sram.bytes": 2048, "buffers.input_bytes": room}))
    (chain,) = executable._layout.chains.values()
    assert chain.tilings[0].block[:2] == (2, columns)
    assert {box[3][1] - box[3][0] for box, _ in chain.tilings[0].strip(4, 6)} == {columns}
    same(executable, net.feed(2))


def test_rows_of_padding_alone_pass_through() -> None:
    """The first four rows and the last four, of windows of one row, read nothing."""
    net = Net()
    middle = net.conv(net.input((4, 3, 64)), 4)
    attrs = {"stride": [1, 1], "padding": [[4, 4], [0, 0]], "dilation": [1, 1], "groups": 1}
    program = net.program(net._dense("conv", middle, (4, 4, 1, 1), (-1, 4, 11, 64), "int8", attrs, None, 20))
    executable = compile_model(program, tiny({"sram.bytes": 1024}))
    assert {one.use for one in executable.memory.scratch} >= {"rows"}
    same(executable, net.feed(2))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_many_random_cascades(data: st.DataObject) -> None:
    test_random_cascades.hypothesis.inner_test(data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_many_random_windows(data: st.DataObject) -> None:
    test_random_windows.hypothesis.inner_test(data)
