"""A compiled Program runs bit for bit from its own buffers; a wrong plan does not get away."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler import Executable, MemoryPlan, compile_model
from qatlib.compiler.machine import POISON, Machine
from qatlib.emulator import emulate
from qatlib.errors import CompileError, OutputError, ProgramError
from qatlib.ops.base import BY_KIND
from qatlib.program import Program
from tests.compiler.compiler_nets import Net, random_net, residual, tiny


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.sampled_from([16, 512, 1024, 4096, 65536]), st.integers(1, 3))
def test_run_equals_the_emulator(seed: int, length: int, sram: int, batch: int) -> None:
    net, program = random_net(seed, length)
    inputs = net.feed(batch)
    outputs = compile_model(program, tiny({"sram.bytes": sram})).run(*inputs)
    for name, ours, theirs in zip(program.outputs, outputs, emulate(program, inputs), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        assert torch.equal(ours, theirs), name


def test_shipped_target_runs_a_residual_net() -> None:
    net, program = residual()
    inputs = net.feed(4)
    (ours,), (theirs,) = compile_model(program, "bayes-like").run(*inputs), emulate(program, inputs)
    assert int((ours != theirs).sum()) == 0
    assert int((theirs != 0).sum()) > 0


def skip_net() -> tuple[Net, Executable, str, str]:
    net = Net()
    skip = net.conv(net.input((1, 8, 8)), 1)
    y = net.conv(skip, 1)
    return net, compile_model(net.program(net.add(y, skip)), tiny()), skip, y


def moved(plan: MemoryPlan, name: str, offset: int) -> MemoryPlan:
    places = dict(plan.places) | {name: plan.places[name].model_copy(update={"offset": offset})}
    return plan.model_copy(update={"places": places})


@pytest.mark.parametrize("shift", [0, 16, -16, 63])
def test_overlapping_live_buffers_are_detected(shift: int) -> None:
    net, executable, skip, y = skip_net()
    plan = executable.memory
    room = plan.sram.model_copy(update={"peak_bytes": plan.sram.peak_bytes + 64})
    plan = moved(moved(plan, skip, 64).model_copy(update={"sram": room}), y, 64 + shift)
    with pytest.raises(CompileError, match=rf"QAT189 {skip}: .*the bytes belong to '{y}'"):
        dataclasses.replace(executable, memory=plan).run(*net.feed(1))


def test_reading_before_writing_is_detected() -> None:
    net, executable, skip, _ = skip_net()
    first, second, third = executable.steps
    with pytest.raises(CompileError, match=rf"QAT189 {skip}: .*nothing was written"):
        dataclasses.replace(executable, steps=(second, first, third)).run(*net.feed(1))


def test_a_place_outside_the_arena_or_missing_is_detected() -> None:
    net, executable, skip, _ = skip_net()
    outside = moved(executable.memory, skip, executable.memory.sram.peak_bytes)
    with pytest.raises(CompileError, match=f"QAT189 {skip}: ends at byte"):
        dataclasses.replace(executable, memory=outside).run(*net.feed(1))
    places = {name: place for name, place in executable.memory.places.items() if name != skip}
    without = executable.memory.model_copy(update={"places": places})
    with pytest.raises(CompileError, match=f"QAT189 {skip}: has no place"):
        dataclasses.replace(executable, memory=without).run(*net.feed(1))


def test_memory_is_poisoned_and_holds_the_bytes_of_the_dtype() -> None:
    net = Net()
    x = net.input((2, 2), "int16")
    executable = compile_model(net.program(net.clamp(x)), tiny())
    machine = Machine(executable.program, executable.memory)
    place = executable.memory.places[x]
    raw = machine._bytes["sram"]
    assert raw.unique().tolist() == [POISON]
    codes = torch.tensor([[[1, -2], [258, -32768]]], dtype=torch.int16)
    machine.write(x, codes)
    assert raw[place.offset : place.offset + 8].tolist() == [1, 0, 0xFE, 0xFF, 2, 1, 0, 0x80]
    assert torch.equal(machine.read(x), codes)


def test_wrong_inputs_and_nan() -> None:
    net, program = residual()
    executable = compile_model(program, tiny())
    (x,) = net.feed(2)
    for bad in ((), (x, x), (x[:, :2],), (x.to(torch.int8),), (x[:0],)):
        with pytest.raises(ProgramError, match="QAT180"):
            executable.run(*bad)
    x[1, 0, 3, 3] = float("nan")
    with pytest.raises(ProgramError, match="QAT181 in0"):
        executable.run(x)


def test_integers_of_another_dtype_are_taken_if_they_are_codes() -> None:
    net, executable, *_ = skip_net()
    (codes,) = net.feed(2)
    (plain,), (wide,) = executable.run(codes), executable.run(codes.to(torch.int64))
    assert torch.equal(plain, wide)
    codes = codes.to(torch.int64)
    codes[1, 0, 2, 3] = 128
    with pytest.raises(ProgramError, match=r"QAT180 in0: holds 128 at \[1, 0, 2, 3\].*\[-128, 127\]"):
        executable.run(codes)


def test_kernels_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, executable, *_ = skip_net()
    prepared = []
    kernel = BY_KIND["conv"].kernel
    monkeypatch.setattr(BY_KIND["conv"], "kernel", lambda op, *rest: prepared.append(op.name) or kernel(op, *rest))
    inputs = net.feed(2)
    runs = [executable.run(*inputs)[0]]
    first = len(prepared)
    assert first >= sum(op.kind == "conv" for op in executable.program)
    runs += [executable.run(*inputs)[0] for _ in range(2)]
    assert len(prepared) == first
    assert all(torch.equal(run, emulate(executable.program, inputs)[0]) for run in runs)


def test_save_and_load(tmp_path: Path) -> None:
    net, program = residual(3)
    executable = compile_model(program, tiny({"sram.bytes": 768}))
    assert executable.memory.spilled
    executable.save(tmp_path / "out")
    executable.save(tmp_path / "again")
    for name in ("executable.json", "performance.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out"]
    loaded = Executable.load(tmp_path / "out")
    assert loaded.steps == executable.steps
    assert loaded.memory == executable.memory
    assert loaded.target == executable.target
    assert loaded.performance == executable.performance
    inputs = net.feed(2)
    assert torch.equal(loaded.run(*inputs)[0], executable.run(*inputs)[0])


def test_saving_again_replaces_an_executable_and_nothing_else(tmp_path: Path) -> None:
    (_, small), (net, large) = residual(1), residual(3)
    compile_model(small, tiny()).save(tmp_path / "out")
    compile_model(large, tiny()).save(tmp_path / "out")
    inputs = net.feed(1)
    assert torch.equal(Executable.load(tmp_path / "out").run(*inputs)[0], emulate(large, inputs)[0])
    small.save(tmp_path / "program")
    with pytest.raises(OutputError, match=r"QAT225 .*holds 'constants.safetensors'"):
        compile_model(small, tiny()).save(tmp_path / "program")
    assert Program.load(tmp_path / "program").ops == small.ops


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{", "", "is not JSON"),
        ('"schema_version": 4', '"schema_version": 3', "is of schema 3; 4 is read here"),
        ('"blocks": {}', '"blocks": {"conv1": [3, 5, 7]}', "3x5x7 is no block"),
        ('"blocks": {}', '"blocks": {"conv1": [3, 5]}', "blocks.conv1"),
        ('"blocks": {}', '"blocks": {"conv9": [1, 1, 16]}', "'conv9', which is no op"),
        ('"opt": "O2"', '"opt": "O4"', "options.opt"),
        ('"joined": []', '"joined": ["conv1"]', "conv1"),
        ('"unit": "npu"', '"unit": "gpu"', "unit"),
        ('"op": "conv1"', '"op": "conv9"', "names other ops"),
        ('"offset": 0', '"offset": 3', "at offset 3"),
        ('"offset": 512', '"offset": -1', "offset"),
        ('"conv1": {', '"conv9": {', "places other values"),
        ('"peak_bytes": 1024', '"peak_bytes": 1040', "peak"),
        ('"clock_hz": 1000000.0', '"clock_hz": 0', "target.clock_hz"),
    ],
)
def test_an_edited_executable_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    _, program = residual()
    compile_model(program, tiny({"sram.bytes": 1024})).save(tmp_path / "out")
    path = tmp_path / "out" / "executable.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CompileError, match="QAT189") as caught:
        Executable.load(tmp_path / "out")
    assert says in str(caught.value)


def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    compile_model(residual()[1], tiny()).save(tmp_path / "out")
    constants = tmp_path / "out" / "program" / "constants.safetensors"
    blob = bytearray(constants.read_bytes())
    blob[-1] ^= 1
    constants.write_bytes(blob)
    with pytest.raises(ProgramError, match="checksum"):
        Executable.load(tmp_path / "out")


def test_missing_files(tmp_path: Path) -> None:
    compile_model(residual()[1], tiny()).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "performance.json").read_text())["target"] == "tiny"
    (tmp_path / "out" / "executable.json").unlink()
    with pytest.raises(CompileError, match="cannot be read"):
        Executable.load(tmp_path / "out")
