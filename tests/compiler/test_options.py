"""Levels, objectives and the other options: what each may do, and that none is worse than it promises."""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.vela import ours
from qatlib.compiler import CompileOptions, Executable, Target, compile_model, load_target
from qatlib.compiler.options import LEVELS
from qatlib.emulator import emulate
from qatlib.errors import CompileError
from qatlib.pipeline.config import CompileParams
from qatlib.program import Program
from tests.compiler.compiler_nets import Net, random_net, residual, tiny


def compiled(program: Program, target: Target, **options: Any) -> Executable:
    return compile_model(program, target, CompileOptions(**options))


def branches(seed: int = 0) -> tuple[Net, Program]:
    """Weights that are read for several areas, two branches that live at once, a join of both."""
    net = Net(seed)
    x = net.conv(net.input((8, 24, 24)), 16)
    left = net.conv(net.conv(x, 32), 16)
    right = net.conv(net.conv(x, 16, 1), 16)
    y = net.conv(net.add(left, right), 32, stride=2)
    return net, net.program(net.conv(y, 64), net.conv(x, 8, 1))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([64, 768, 2048, 65536]))
def test_no_level_is_worse_than_the_one_below_it(seed: int, length: int, sram: int) -> None:
    _, program = random_net(seed, length)
    target = tiny({"sram.bytes": sram})
    cycles = [compiled(program, target, opt=opt).performance.cycles for opt in LEVELS]
    assert cycles == sorted(cycles, reverse=True)
    bytes_ = [compiled(program, target, opt=opt, objective="bandwidth").performance.dram_bytes for opt in LEVELS]
    assert bytes_ == sorted(bytes_, reverse=True)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([64, 768, 2048]), st.sampled_from(LEVELS))
def test_objectives_save_what_they_are_named_for(seed: int, length: int, sram: int, opt: str) -> None:
    _, program = random_net(seed, length)
    target = tiny({"sram.bytes": sram})
    fast, lean, both = (
        compiled(program, target, opt=opt, objective=objective).performance
        for objective in ("latency", "bandwidth", "balance")
    )
    assert lean.dram_bytes <= fast.dram_bytes
    assert (1 + both.cycles) * (1 + both.dram_bytes) <= (1 + fast.cycles) * (1 + fast.dram_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("network", ours.NETWORKS)
def test_levels_of_real_networks(network: str) -> None:
    program = ours.program(network)
    for name in ("bayes-like", "ethos-u85-512-like"):
        target = load_target(name)
        start = process_time()
        best = compiled(program, target, opt="O3").performance
        assert process_time() - start < 10  # of one core
        fast, lean = (compiled(program, target, objective=objective) for objective in ("latency", "bandwidth"))
        one, none = (compiled(program, target, opt=opt).performance.cycles for opt in ("O1", "O0"))
        assert best.cycles < fast.performance.cycles <= one <= none
        assert lean.performance.dram_bytes <= fast.performance.dram_bytes


def test_each_level_gains_on_a_net_that_has_what_it_is_about() -> None:
    _, program = branches()
    target = tiny({"sram.bytes": 16384, "buffers.input_bytes": 4096})
    found = {opt: compiled(program, target, opt=opt) for opt in LEVELS}
    plans = {opt: executable.memory for opt, executable in found.items()}
    assert plans["O0"].sram.peak_bytes == 0
    assert 0 < plans["O1"].sram.peak_bytes <= 16384
    assert not plans["O1"].scratch
    assert plans["O2"].scratch
    cycles = [found[opt].performance.cycles for opt in LEVELS]
    assert cycles == sorted(set(cycles), reverse=True)
    assert found["O3"].search.kept > 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([64, 768, 2048]), st.sampled_from(LEVELS))
def test_values_do_not_depend_on_the_level(seed: int, length: int, sram: int, opt: str) -> None:
    net, program = random_net(seed, length)
    inputs = net.feed(2)
    outputs = compiled(program, tiny({"sram.bytes": sram}), opt=opt, objective="balance").run(*inputs)
    for x, y in zip(outputs, emulate(program, inputs), strict=True):
        assert torch.equal(x, y)


def test_a_search_is_repeated_bit_for_bit_and_read_back(tmp_path: Path) -> None:
    net, program = branches()
    target = tiny({"sram.bytes": 8192, "buffers.input_bytes": 4096})
    first, again = (compiled(program, target, opt="O3", seed=3) for _ in range(2))
    assert first.blocks
    for name, executable in (("a", first), ("b", again)):
        executable.save(tmp_path / name)
    for file in ("executable.json", "performance.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded = Executable.load(tmp_path / "a")
    for field in ("target", "steps", "memory", "performance", "options", "blocks", "search"):
        assert getattr(loaded, field) == getattr(first, field)
    inputs = net.feed(2)
    for x, y in zip(loaded.run(*inputs), emulate(program, inputs), strict=True):
        assert torch.equal(x, y)


def test_another_seed_searches_elsewhere() -> None:
    _, program = branches()
    target = tiny({"sram.bytes": 8192, "buffers.input_bytes": 4096})
    found = {compiled(program, target, opt="O3", seed=seed).performance.cycles for seed in range(4)}
    assert max(found) <= compiled(program, target).performance.cycles
    steps = {compiled(program, target, opt="O3", seed=seed).search.kept for seed in range(4)}
    assert len(steps) > 1 or len(found) > 1


def test_the_time_limit_ends_the_search_and_the_plan_says_so() -> None:
    _, program = branches()
    target = tiny({"sram.bytes": 8192, "buffers.input_bytes": 4096})
    short = compiled(program, target, opt="O3", time_limit_s=1e-9)
    assert (short.search.steps, short.search.cut) == (1, True)
    assert short.performance.cycles <= compiled(program, target).performance.cycles
    assert not compiled(program, target, opt="O3").search.cut


def test_steps_keep_the_order_of_what_they_need() -> None:
    for seed in range(3):
        _, program = random_net(seed, 10)
        executable = compiled(program, tiny({"sram.bytes": 1024}), opt="O3", seed=seed)
        there = set(program.inputs)
        for step in executable.steps:
            assert there >= set(step.op.inputs)
            there.add(step.op.output)
        assert sorted(step.op.name for step in executable.steps) == sorted(op.name for op in program)


def test_input_source() -> None:
    net = Net()
    program = net.program(net.conv(net.input((4, 16, 16)), 4))
    target = tiny({"sram.bytes": 4096})
    auto, ddr, sram = (compiled(program, target, input_source=source) for source in ("auto", "ddr", "sram"))
    assert [e.memory.places["in0"].arena for e in (auto, ddr, sram)] == ["sram", "dram", "sram"]
    assert ddr.performance.dram_bytes - sram.performance.dram_bytes >= 4 * 16 * 16
    assert ddr.performance.cycles > sram.performance.cycles
    for opt in LEVELS:  # also where all other maps are off chip
        assert compiled(program, target, input_source="sram", opt=opt).memory.places["in0"].arena == "sram"


def test_the_host_writes_quantized_inputs_where_they_are_said_to_be() -> None:
    net, program = residual()
    for source, arena in (("ddr", "dram"), ("sram", "sram")):
        executable = compiled(program, tiny(), input_source=source)
        assert executable.memory.places["quantize0"].arena == arena
        inputs = net.feed(2)
        assert torch.equal(executable.run(*inputs)[0], emulate(program, inputs)[0])


def test_cores_share_the_bandwidth_of_the_dram() -> None:
    _, program = branches()
    target = tiny({"sram.bytes": 8192, "cores": 4})
    one, four = compiled(program, target), compiled(program, target, cores=4)
    slow = compile_model(program, tiny({"sram.bytes": 8192, "dram.bytes_per_s": 1.0e6}))
    assert four.performance.cycles == slow.performance.cycles >= one.performance.cycles
    assert one.performance.fps is not None
    assert four.performance.fps == pytest.approx(4e6 / four.performance.cycles)
    assert one.performance.fps <= four.performance.fps <= 4 * one.performance.fps
    assert four.target == target


def test_options_may_be_a_mapping() -> None:
    _, program = residual()
    assert compile_model(program, tiny(), {"opt": "O0"}).options == CompileOptions(opt="O0")
    with pytest.raises(ValidationError):
        CompileOptions(opt="O2").opt = "O3"  # type: ignore[misc]


def test_params_have_the_same_options() -> None:
    mine, theirs = CompileOptions.model_json_schema(), CompileParams.model_json_schema()
    assert CompileParams().options == CompileOptions().model_dump()
    for name, schema in mine["properties"].items():
        assert theirs["properties"][name] == schema


@pytest.mark.parametrize(
    ("options", "target", "says"),
    [
        ({"opt": "O4"}, {}, "opt: Input should be 'O0', 'O1', 'O2' or 'O3', not 'O4'"),
        ({"opt": 2}, {}, "opt"),
        ({"objective": "power"}, {}, "objective"),
        ({"seed": -1}, {}, "seed"),
        ({"seed": True}, {}, "seed"),
        ({"time_limit_s": 0.0}, {}, "time_limit_s"),
        ({"time_limit_s": float("nan")}, {}, "time_limit_s"),
        ({"time_limit_s": float("inf")}, {}, "time_limit_s"),
        ({"cores": 0}, {}, "cores"),
        ({"level": "O1"}, {}, "level: unknown key"),
        ([1], {}, "valid dictionary"),
        ("O3", {}, "valid dictionary"),
        ({"opt": "O9", "seed": "x"}, {}, "seed"),
        ({"cores": 2}, {}, "is 2, but tiny has 1"),
        ({"input_source": "sram"}, {"sram.holds_boundary": False}, "may not hold inputs"),
        ({"input_source": "sram"}, {"sram.bytes": 128}, "in0 of 192 bytes do not stay in the 128"),
    ],
)
def test_misuse_is_one_line(options: Any, target: dict[str, Any], says: str) -> None:
    net = Net()
    program = net.program(net.conv(net.input((3, 8, 8)), 4))
    with pytest.raises(CompileError, match=r"^QAT250 [^\n]*$") as caught:
        compile_model(program, tiny(target), options)
    assert says in str(caught.value)
