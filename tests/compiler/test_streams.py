"""Weights in the machine's order: stored, staged, read and decoded as they are, and counted as they are stored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler import Executable, compile_model, load_target
from qatlib.compiler import streams as module
from qatlib.compiler.executable import IMAGE
from qatlib.compiler.streams import Order, encoded
from qatlib.emulator import emulate
from qatlib.errors import CompileError, QatError
from qatlib.program import Program
from tests.compiler.compiler_nets import Net, random_net, residual, tiny
from tests.compiler.test_tiled import same, small_core
from tests.kind_nets import NETS
from tests.oracle import weights as oracle

ON: dict[str, Any] = {"weights": {"compression": True}}


def weight(shape: Sequence[int], seed: int = 0, dtype: str = "int8") -> torch.Tensor:
    """Of random sections some are sparse."""
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 20, shape) * (rng.random(shape) < rng.random((shape[0], *[1] * (len(shape) - 1))))
    return torch.from_numpy(found.clip(-128, 127).astype(dtype))


# -- order -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_stream_is_what_the_page_describes(data: st.DataObject) -> None:
    small = st.integers(1, 5)
    groups, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    section = data.draw(st.integers(1, 9)) if groups == 1 else data.draw(st.integers(1, 2)) * group
    shape = (groups * group, data.draw(st.integers(1, 9)), data.draw(small))
    order = Order(
        section=section, group=group, tile=data.draw(small), pass_inputs=data.draw(small), inputs=data.draw(small),
        taps=data.draw(small),
    )  # fmt: skip
    weights = weight(shape, data.draw(st.integers(0, 99)), data.draw(st.sampled_from(["int8", "int16"])))
    stream = encoded(weights, order)
    found = oracle.stream(stream.data, shape, order.model_dump(), stream.dtype)
    assert len(found) == weights.numel()
    assert all(int(weights[place]) == number for place, number in found.items())
    starts = [*range(0, shape[0], section), shape[0]]
    a, b = sorted(data.draw(st.lists(st.sampled_from(starts), min_size=2, max_size=2, unique=True)))
    low, high = stream.span(a, b)
    assert torch.equal(stream.decode(stream.data[low:high], a, b, "op"), weights[a:b])


def test_the_order_is_that_of_the_array() -> None:
    """Tiles of 4 outputs, steps of 2 inputs, passes of 4, sections of 8 outputs."""
    net = Net()
    changes = {
        **ON, "mac_array.tiles": [[1, 1, 4]], "mac_array.depth_first": {"channels": 2, "pass_channels": 4},
        "buffers.block_channels": 8,
    }  # fmt: skip
    executable = compile_model(net.program(net.conv(net.input((6, 4, 4)), 20)), tiny(changes))
    (stream,) = executable.streams.values()
    assert stream.starts == (0, 8, 16, 20)
    places = list(oracle.in_order(0, 8, 6, 9, stream.order.model_dump()))
    assert places[:9] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0), (3, 0, 0), (3, 1, 0), (0, 2, 0),
    ]  # fmt: skip
    assert places[16] == (0, 0, 1)  # after four inputs the next tap,
    assert places[16 * 9] == (4, 0, 0)  # after all taps the next tile,
    assert places[2 * 16 * 9] == (0, 4, 0)  # after all tiles the next pass


@pytest.mark.parametrize(("groups", "section"), [(1, 8), (2, 12), (6, 8), (24, 8)])
def test_sections_are_whole_groups(groups: int, section: int) -> None:
    net = Net()
    program = net.program(net.conv(net.input((24, 4, 4)), 24, groups=groups))
    (stream,) = compile_model(program, tiny({**ON, "buffers.block_channels": 8})).streams.values()
    assert stream.order.section == section
    assert stream.order.group == (24 if groups == 24 else 24 // groups)


# -- runs --------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 10),
    sram=st.sampled_from([256, 1024, 4096, 65536]),
    channels=st.sampled_from([1, 4, 16]),
)
def test_random_nets_run_from_stored_weights(seed: int, length: int, sram: int, channels: int) -> None:
    net, program = random_net(seed, length)
    changes = {**ON, "sram.bytes": sram, "dram.bytes_per_s": 1.0e5, "buffers.block_channels": channels}
    executable = compile_model(program, tiny(changes))
    assert {op.name for op in program if op.kind in ("conv", "linear")} == set(executable.streams)
    same(executable, net.feed(2))


@pytest.mark.parametrize("name", ["encoder and decoder", "five axes", "attention", "embedding of ids"])
def test_every_kind_with_weights_runs_from_stored_ones(name: str) -> None:
    net = NETS[name]
    target = load_target("bayes-like")
    on = target.weights.model_copy(update={"compression": True})
    executable = compile_model(net.program(), small_core(target.model_copy(update={"weights": on}), (3, 2, 16)))
    same(executable, tuple(x[:2] for x in net.inputs))


def staged(groups: int = 1) -> tuple[Net, Executable]:
    net = Net(groups)
    program = net.program(net.conv(net.input((24, 9, 9)), 48, groups=groups))
    key = program.ops[0].consts["weight"]
    program = dataclasses.replace(
        program, constants={**program.constants, key: weight(program.constants[key].shape, groups)}
    )
    changes = {**ON, "dram.bytes_per_s": 1.0e5, "buffers.block_channels": 4}
    return net, compile_model(program, small_core(tiny(changes), (4, 4, 8)))


@pytest.mark.parametrize("groups", [1, 2, 3, 24])
def test_slices_are_staged_as_they_are_stored(groups: int) -> None:
    net, executable = staged(groups)
    (pieces,), (stream,) = executable._layout.slices.values(), executable.streams.values()
    assert (pieces[0].start, pieces[-1].stop) == (0, 48)
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert len(pieces) > 1 or groups == 3  # there all come early
    rooms = {scratch.offset: scratch.size for scratch in executable.memory.scratch}
    for piece in pieces:
        assert len(piece.stored(executable.program)) <= rooms[piece.offset]
    assert b"".join(bytes(piece.stored(executable.program).numpy()) for piece in pieces) == stream.data
    same(executable, net.feed(2))


def test_a_plan_whose_staged_weights_overlap_is_detected() -> None:
    net, executable = staged()
    offsets = {scratch.offset for scratch in executable.memory.scratch}
    scratch = tuple(s.model_copy(update={"offset": min(offsets)}) for s in executable.memory.scratch)
    x = executable.program.inputs[0]
    places = {**executable.memory.places}
    places[x] = places[x].model_copy(update={"arena": "sram", "offset": min(offsets)})
    plan = executable.memory.model_copy(update={"scratch": scratch, "places": places})
    with pytest.raises(CompileError, match="QAT189"):
        dataclasses.replace(executable, memory=plan).run(*net.feed(1))


@pytest.mark.parametrize("make", [staged, lambda: (residual()[0], compile_model(residual()[1], tiny(ON)))])
def test_a_run_uses_what_is_stored(make: Any) -> None:
    """Other weights in the streams, other results; bytes that are no section, one line."""
    net, executable = make()
    name, stream = next(iter(executable.streams.items()))
    program = executable.program
    negative = -program.constant(next(op for op in program if op.name == name), "weight").clamp(-127, 127)
    other = {**executable.streams, name: encoded(negative, stream.order)}
    inputs = net.feed(2)
    op = next(op for op in program if op.name == name)
    changed = dataclasses.replace(program, constants={**program.constants, op.consts["weight"]: negative})
    (found,) = dataclasses.replace(executable, streams=other).run(*inputs)
    assert torch.equal(found, emulate(changed, inputs)[0])
    assert not torch.equal(found, emulate(program, inputs)[0])
    broken = dataclasses.replace(stream, data=b"\x07" + stream.data[1:])
    with pytest.raises(CompileError, match=rf"QAT251 {name}: .*section 0 is of form 7") as caught:
        dataclasses.replace(executable, streams={**executable.streams, name: broken}).run(*inputs)
    assert "\n" not in str(caught.value)


# -- sizes -------------------------------------------------------------------------------------------------------------


def sparse_net() -> tuple[Net, Program]:
    net = Net(5)
    x = net.conv(net.input((16, 8, 8)), 64)
    y = net.conv(x, 64, groups=64)
    program = net.program(net.conv(y, 40, 1))
    keys = {op.consts["weight"] for op in program}
    return net, dataclasses.replace(
        program, constants={k: weight(v.shape, 9) if k in keys else v for k, v in program.constants.items()}
    )


def test_the_estimate_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    _, program = sparse_net()
    executable, plain = compile_model(program, tiny(ON)), compile_model(program, tiny())
    executable.save(tmp_path / "on")
    plain.save(tmp_path / "off")
    blob = (tmp_path / "on" / IMAGE).read_bytes()
    table = json.loads((tmp_path / "on" / "executable.json").read_text())["weights"]
    rows = {row.op: row for row in executable.performance.rows}
    assert sum(row.weight_bytes for row in rows.values()) == len(blob)
    for entry in table:
        op = next(op for op in program if op.name == entry["op"])
        weights = program.constant(op, "weight")
        assert rows[op.name].weight_bytes == -(-entry["bytes"] // 16) * 16
        assert rows[op.name].plain_weight_bytes == weights.numel()
        assert entry["offset"] % 16 == 0
        shape = (entry["shape"][0], entry["shape"][1], math.prod(entry["shape"][2:]))
        found = oracle.stream(
            blob[entry["offset"] : entry["offset"] + entry["bytes"]], shape, entry["order"], entry["dtype"]
        )
        assert [found[place] for place in np.ndindex(shape)] == weights.flatten().tolist()
    saved = plain.performance.static_bytes - executable.performance.static_bytes
    assert saved == sum(op.plain_weight_bytes for op in plain.performance.rows) - len(blob) > 0
    assert executable.performance.dram_bytes < plain.performance.dram_bytes
    sizes = {kind: sum(f.stat().st_size for f in (tmp_path / kind).rglob("*.[sb]*")) for kind in ("on", "off")}
    assert sizes["off"] - sizes["on"] >= saved
    assert not (tmp_path / "off" / IMAGE).exists()


def test_equal_weights_are_stored_once() -> None:
    net = Net()
    x = net.input((8, 4, 4))
    program = net.program(net.conv(x, 8), net.conv(x, 8))
    first, second = program.ops
    constants = {**program.constants, second.consts["weight"]: program.constant(first, "weight").clone()}
    executable = compile_model(dataclasses.replace(program, constants=constants), tiny(ON))
    assert len(executable.streams) == 2
    (row, *_), (stream, *_) = executable.performance.rows, executable.streams.values()
    others = sum(program.constants[key].nbytes for op in program for role, key in op.consts.items() if role != "weight")
    assert executable.performance.static_bytes == others + row.weight_bytes
    assert 0 <= row.weight_bytes - len(stream.data) < 16


def test_nothing_is_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = sparse_net()
    calls, encode = [], module.encode
    monkeypatch.setattr(module, "encode", lambda codes: calls.append(len(codes)) or encode(codes))
    executable = compile_model(program, tiny({**ON, "sram.bytes": 4096}), {"opt": "O3"})
    assert executable.search.steps > 3
    assert len(calls) == sum(len(stream.ends) - 1 for stream in executable.streams.values())
    assert executable.job.streams == executable.streams
    again = compile_model(program, tiny(ON))
    assert len(calls) == sum(len(stream.ends) - 1 for stream in executable.streams.values())
    assert again.streams == executable.streams


# -- files -------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    net, program = sparse_net()
    executable = compile_model(program, tiny(ON))
    for name in ("out", "again"):
        executable.save(tmp_path / name)
    for name in ("executable.json", "performance.json", IMAGE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    del executable
    loaded = Executable.load(tmp_path / "out")
    for key, constant in program.constants.items():
        assert torch.equal(loaded.program.constants[key], constant)
    assert loaded.performance == compile_model(program, tiny(ON)).performance
    same(loaded, net.feed(2))
    compile_model(program, tiny()).save(tmp_path / "out")
    assert not (tmp_path / "out" / IMAGE).exists()


def resealed(folder: Path, blob: bytes, change: Any = None) -> None:
    (folder / IMAGE).write_bytes(blob)
    document = json.loads((folder / "executable.json").read_text())
    document["weights_sha256"] = hashlib.sha256(blob).hexdigest()
    if change:
        change(document)
    (folder / "executable.json").write_text(json.dumps(document))


def edit(**changes: Any) -> Any:
    return lambda document: document["weights"][0].update(changes)


def order_of(document: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = document["weights"][0]["order"]
    return found


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder, blob: (folder / IMAGE).write_bytes(blob[:-1]), r"weights.bin: .*checksum"),
        (lambda folder, blob: (folder / IMAGE).unlink(), r"weights.bin: cannot be read"),
        (lambda folder, blob: resealed(folder, b"\x09" + blob[1:]), "section 0 is of form 9"),
        (lambda folder, blob: resealed(folder, blob[:5] + b"\xff" + blob[6:]), "a section ends within its header"),
        (lambda folder, blob: resealed(folder, blob[:40]), "ends within its header|at byte|goes on|bytes for"),
        (lambda folder, blob: resealed(folder, blob, edit(shape=[1 << 20, 1 << 20])), "would hold"),
        (lambda folder, blob: resealed(folder, blob, edit(shape=[4, 16, 3, 3])), "ends at byte"),
        (lambda folder, blob: resealed(folder, bytes(64) + blob, lambda d: None), "section"),
        (lambda folder, blob: resealed(folder, blob, edit(key="conv0.bias")), "QAT174 .*'conv0.weight'"),
        (lambda folder, blob: resealed(folder, blob, lambda d: order_of(d).update(group=3)), "hold no groups of 3"),
        (lambda folder, blob: resealed(folder, blob, lambda d: order_of(d).update(tile=0)), "QAT189 .*order.tile"),
        (lambda folder, blob: resealed(folder, blob, lambda d: d.update(weights=[])), "QAT174 .*is missing"),
        (lambda folder, blob: resealed(folder, blob, edit(offset=-1)), "QAT189 .*offset"),
    ],
)  # fmt: skip
def test_damaged_weights_are_refused(tmp_path: Path, damage: Any, says: str) -> None:
    compile_model(sparse_net()[1], tiny(ON)).save(tmp_path / "out")
    damage(tmp_path / "out", (tmp_path / "out" / IMAGE).read_bytes())
    with pytest.raises(QatError, match=says) as caught:
        Executable.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_other_weights_than_the_table_says_are_refused(tmp_path: Path) -> None:
    """Sections that are whole, but not in the order of this op."""
    compile_model(sparse_net()[1], tiny(ON)).save(tmp_path / "out")

    def swap(document: dict[str, Any]) -> None:
        order_of(document)["tile"] = 8

    resealed(tmp_path / "out", (tmp_path / "out" / IMAGE).read_bytes(), swap)
    with pytest.raises(CompileError, match=r"QAT251 .*other weights than its Program"):
        Executable.load(tmp_path / "out")


# -- targets -----------------------------------------------------------------------------------------------------------


def test_sizes_are_either_stored_or_assumed() -> None:
    with pytest.raises(CompileError, match=r"QAT183 .*weights: compression is on.*leave out padding, header_bytes"):
        tiny({"weights": {"compression": True, "padding": 0.5, "header_bytes": 32}})


def test_the_decoder_takes_what_a_step_has() -> None:
    """4 x 16 weights of a step of 4 inputs, at 8 a cycle: 8 cycles instead of 4, for each of 2 x 9 steps."""
    net = Net()
    program = net.program(net.conv(net.input((8, 1, 1)), 16))
    changes = {**ON, "mac_array.depth_first": {"channels": 4, "cycles": 4}, "dram.bytes_per_s": 4.0e9}
    slow = {**changes, "weights": {"compression": True, "decoded_per_cycle": 8}}
    (fast,), (held,) = (compile_model(program, tiny(one)).performance.rows for one in (changes, slow))
    assert held.cycles > fast.cycles
    assert held.stall_weights - fast.stall_weights == pytest.approx(4 * 18, abs=2)
