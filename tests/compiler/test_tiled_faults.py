"""A wrong plan, or regions that an operator states wrongly, stop a run (QAT189); too small a core is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest

from qatlib.compiler import Executable, compile_model, try_compile
from qatlib.compiler import layout as layout_module
from qatlib.compiler.layout import Slice
from qatlib.compiler.memory import MemoryPlan, misfit
from qatlib.compiler.tiled import Runner
from qatlib.emulator import emulate
from qatlib.errors import CompileError
from qatlib.ops.base import BY_KIND
from qatlib.ops.region import Box, Need, Part, Regions
from qatlib.program import Op, Program
from tests.compiler.compiler_nets import Net, tiny

SMALL = {"buffers.max_block": [4, 4, 16]}


def two_convs(rows: int = 4) -> tuple[Net, Executable]:
    net = Net()
    middle = net.conv(net.input((4, 12, 12)), 8)
    target = tiny({"buffers.max_block": [rows, 4, 16]})
    return net, compile_model(net.program(net.conv(middle, 8)), target)


def cascade() -> tuple[Net, Executable]:
    """Two convolutions whose map in between passes row by row."""
    net = Net()
    middle = net.conv(net.input((2, 40, 4)), 4)
    executable = compile_model(net.program(net.conv(middle, 4)), tiny({"sram.bytes": 768}))
    (rows,) = [s for s in executable.memory.scratch if s.use == "rows"]
    assert executable.memory.places[middle].arena == "rows"
    assert rows.size < executable.memory.places[middle].bytes
    return net, executable


def fails(executable: Executable, net: Net, match: str) -> None:
    with pytest.raises(CompileError, match=match) as caught:
        executable.run(*net.feed(2))
    assert "\n" not in str(caught.value)


def test_they_run_as_planned() -> None:
    for net, executable in (two_convs(), cascade()):
        inputs = net.feed(2)
        (ours,), (theirs,) = executable.run(*inputs), emulate(executable.program, inputs)
        assert int((ours != theirs).sum()) == 0


def patched(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Let convolutions say something wrong of their regions."""
    right = type(BY_KIND["conv"]).regions

    def wrong(self: object, op: Op, program: Program) -> Regions:
        regions = right(BY_KIND["conv"], op, program)  # type: ignore[arg-type]

        def part(box: Box) -> Part:
            found = regions.part(box)
            (need, *rest) = found.needs
            assert need is not None
            low, high = need.box[2]
            rows = (low, high - 1) if change == "short" else (low - 1, high)
            return dataclasses.replace(found, needs=(Need((*need.box[:2], rows, need.box[3])), *rest))

        return dataclasses.replace(regions, part=part)

    monkeypatch.setattr(type(BY_KIND["conv"]), "regions", wrong)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("change", ["short", "long"])
def test_a_halo_of_another_height_is_detected(monkeypatch: pytest.MonkeyPatch, change: str, rows: int) -> None:
    net, executable = two_convs(rows)
    patched(monkeypatch, change)
    fails(executable, net, "QAT189 conv0: gets .* for the box")


def test_a_region_that_is_left_out_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    net, executable = two_convs()
    boxes = Regions.boxes
    monkeypatch.setattr(Regions, "boxes", lambda self, sizes, block: boxes(self, sizes, block)[:-1])
    fails(executable, net, r"QAT189 conv0: is read at element \[0, 0, 8, 8\], where nothing was written")


def test_an_element_of_the_result_that_is_left_out_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    executable = compile_model(net.program(net.clamp(net.input((4, 12, 12)))), tiny({**SMALL, "sram.bytes": 1024}))
    boxes = Regions.boxes
    monkeypatch.setattr(Regions, "boxes", lambda self, sizes, block: boxes(self, sizes, block)[1:])
    fails(executable, net, r"QAT189 clamp0: is read at element \[0, 0, 0, 0\], where nothing was written")


@pytest.mark.parametrize("shift", [0, 16, 560])
def test_buffers_that_overlap_in_some_boxes_are_detected(shift: int) -> None:
    net, executable = two_convs()
    plan = executable.memory
    at = plan.places["conv0"].offset + shift
    places = dict(plan.places) | {"conv1": plan.places["conv1"].model_copy(update={"offset": at})}
    use = plan.sram.model_copy(update={"peak_bytes": 8192})
    wrong = plan.model_copy(update={"places": places, "sram": use})
    fails(dataclasses.replace(executable, memory=wrong), net, "QAT189 conv0: .* belong to 'conv1'")


# -- rows --------------------------------------------------------------------------------------------------------------


def with_rows(plan: MemoryPlan, **changes: int) -> MemoryPlan:
    scratch = [s.model_copy(update=changes) if s.use == "rows" else s for s in plan.scratch]
    return plan.model_copy(update={"scratch": tuple(scratch)})


@pytest.mark.parametrize("changes", [{"size": 0}, {"last": 0}, {"last": 99}])
def test_rows_that_hold_nothing_or_pass_nowhere_are_no_plan(changes: dict[str, int]) -> None:
    _, executable = cascade()
    steps, target = executable.steps, executable.target
    assert misfit(executable.memory, executable.program, steps, target) == ""
    wrong = with_rows(executable.memory, **changes)
    assert "rows of 'conv0'" in misfit(wrong, executable.program, steps, target)


def test_too_few_rows_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    net, executable = cascade()
    row = 4 * 4
    monkeypatch.setattr(layout_module, "rolling_bytes", lambda task, job: 3 * row)
    fails(executable, net, "QAT189 conv0: is asked for 4 rows at once, of which the SRAM holds 3")


def test_rows_that_are_gone_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is written over the rows of the map in between."""
    net, executable = cascade()
    plan = executable.memory
    result = plan.places["conv1"]
    assert result.arena == "dram"
    moved = {"conv1": result.model_copy(update={"arena": "sram", "offset": 1024})}
    wrong = with_rows(plan.model_copy(update={"places": dict(plan.places) | moved}), offset=1024)
    wrong = wrong.model_copy(update={"sram": plan.sram.model_copy(update={"peak_bytes": 4096})})
    fails(dataclasses.replace(executable, memory=wrong), net, "QAT189 conv0: .* where the bytes belong to 'conv1'")


def test_rows_outside_of_the_memory_are_detected() -> None:
    net, executable = cascade()
    wrong = with_rows(executable.memory, offset=executable.memory.sram.peak_bytes)
    fails(dataclasses.replace(executable, memory=wrong), net, "QAT189 conv0: ends at byte .* of sram")


# -- a core that is too small ------------------------------------------------------------------------------------------


def test_buffers_without_room_for_one_block_are_refused() -> None:
    net = Net()
    wide = net.conv(net.input((16, 12, 12)), 16, kernel=1)
    program = net.program(net.conv(wide, 16))
    small = tiny({"buffers.input_bytes": 256})
    executable, (violation,) = try_compile(program, small)
    assert executable is None
    assert str(violation).startswith(
        "QAT186 conv1: its smallest block needs buffers of 288 bytes for inputs and 128 for"
    )
    with pytest.raises(CompileError, match=f"QAT186 .*1 violation:\n  {re.escape(str(violation))}"):
        compile_model(program, small)


def test_buffers_with_just_enough_room_are_used() -> None:
    net = Net()
    program = net.program(net.conv(net.input((16, 12, 12)), 16))
    enough = {"buffers.input_bytes": 2 * 9 * 16, "buffers.accumulator_bytes": 2 * 16 * 4}
    executable, inputs = compile_model(program, tiny(enough)), net.feed(1)
    assert {tiling.block for tiling in executable._layout.tilings if tiling} == {(1, 1, 16)}
    assert int((executable.run(*inputs)[0] != emulate(program, inputs)[0]).sum()) == 0
    with pytest.raises(CompileError, match="QAT186"):
        compile_model(program, tiny(enough | {"buffers.input_bytes": 2 * 9 * 16 - 1}))


def test_of_a_kernel_cut_into_pieces_only_one_has_to_fit() -> None:
    net = Net()
    program = net.program(net.conv(net.input((16, 20, 20)), 16, kernel=9))
    small = {"buffers.input_bytes": 2 * 5 * 5 * 16}
    with pytest.raises(CompileError, match="QAT186 conv0"):
        compile_model(program, tiny(small))
    executable, inputs = compile_model(program, tiny(small | {"mac_array.max_kernel": 5})), net.feed(1)
    assert int((executable.run(*inputs)[0] != emulate(program, inputs)[0]).sum()) == 0


# -- staged weights ----------------------------------------------------------------------------------------------------


def staged() -> tuple[Net, Executable]:
    """A convolution whose weights come to the SRAM in several slices."""
    net = Net()
    x = net.clamp(net.input((16, 12, 12)))
    executable = compile_model(net.program(net.conv(x, 96)), tiny({**SMALL, "dram.bytes_per_s": 1.0e5}))
    (pieces,) = executable._layout.slices.values()
    assert len(pieces) > 2
    assert len({piece.offset for piece in pieces}) == 2
    return net, executable


def test_weights_in_slices_run_as_planned() -> None:
    net, executable = staged()
    inputs = net.feed(3)
    assert int((executable.run(*inputs)[0] != emulate(executable.program, inputs)[0]).sum()) == 0


def test_slices_of_weights_that_overlap_are_detected() -> None:
    net, executable = staged()
    plan = executable.memory
    scratch = tuple(s.model_copy(update={"offset": plan.places["clamp0"].offset}) for s in plan.scratch)
    wrong = dataclasses.replace(executable, memory=plan.model_copy(update={"scratch": scratch}))
    fails(wrong, net, "QAT189 (conv1: reads staged weights, where the|clamp0: .* where the) bytes belong to ")


def test_weights_that_a_slice_overwrote_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second slice is loaded over the first one before that is used."""
    net, executable = staged()
    ((first, second, *_),) = executable._layout.slices.values()
    load = Runner._load

    def twice(self: Runner, piece: Slice) -> None:
        load(self, piece)
        if piece == first:
            load(self, dataclasses.replace(second, offset=first.offset))

    monkeypatch.setattr(Runner, "_load", twice)
    fails(executable, net, "QAT189 conv1: reads staged weights, where others of its own lie")
