"""Random nets along the whole way of a user: prepare, calibrate, convert, then every runtime, 0 differing elements.

The default run takes a few nets; ``-m slow`` takes more than 200.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatlib.compiler import compile_model
from qatlib.compiler.target import Target, load_target
from qatlib.conversion import to_program
from qatlib.emulator import Emulator
from qatlib.errors import QatError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.ops.base import BY_KIND, Operator
from qatlib.program import Program, Value
from tests.nets import RandomNet, random_net
from tests.onnx_runtime import assert_same_in_onnx
from tests.oracle import run
from tests.oracle.derive import derived_factors
from tests.test_exactness import differing, on_threads

FAST_SEEDS = range(8)
SLOW_SEEDS = range(1000, 1220)
BATCH = 3


def converted(net: RandomNet) -> Program:
    """The Program of ``net``, calibrated on two batches."""
    prepared = prepare_qat_fx(net.model, net.qconfigs, example_inputs=net.batch(2, 1))
    calibrate(prepared, [(list(net.batch(4, seed)), None) for seed in (2, 3)])
    return to_program(prepared, multiplier_bits=net.multiplier_bits)


def permissive() -> Target:
    """A target that takes every kind in every format."""
    document = load_target("bayes-like").model_dump()
    every = ["int8", "int16", "int32"]
    kinds = [kind for kind, op in BY_KIND.items() if type(op).kernel is not Operator.kernel]
    rule = {"inputs": every, "outputs": every, "weights": ["int8", "int16"]}
    document["ops"] = {kind: rule for kind in kinds if kind not in ("quantize", "dequantize", "float_op")}
    document["ops"]["table"] = rule | {"inputs": ["int8", "int16"]}
    document["multiplier_bits"] = 21
    document["mac_array"]["int16"] = 2.0
    document["vector_unit"]["elements_per_cycle"] = dict.fromkeys(every, 16)
    return Target.model_validate(document)


def sample(value: Value, x: Tensor, i: int) -> Tensor:
    """What sample i of a batch has of ``value``: its part along the axis of the batch, or all where there is none."""
    for axis, size in enumerate(value.shape):
        if size < 0:
            return x.narrow(axis, -size * i, -size)
    return x


def numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: x.numpy() for name, x in values.items()}


def is_exact_everywhere(net: RandomNet, folder: Path) -> Program:
    """Emulator, Executable, ONNX Runtime (optimizations off and on) and the files agree with the oracle on ``net``."""
    folder.mkdir(exist_ok=True)
    program = converted(net)
    inputs = net.batch(BATCH, 4, reach=1.5)
    expected = run(program, *(x.numpy() for x in inputs))
    emulator = Emulator(program)
    traced = emulator.trace(*inputs)
    assert differing(expected, traced) == {}
    assert differing(expected, on_threads(2, emulator, list(inputs))) == {}
    for i in range(BATCH):
        single = emulator.trace(*(x[i : i + 1] for x in inputs))
        part = {name: sample(program.values[name], x, i) for name, x in traced.items()}
        assert differing(numpy(part), single) == {}
    assert wrong_factors(program) == {}
    outputs = {name: expected[name] for name in program.outputs}
    program.save(folder / "program")
    assert differing(outputs, named(program, Emulator(Program.load(folder / "program"))(*inputs))) == {}
    assert differing(outputs, named(program, compile_model(program, permissive()).run(*inputs))) == {}
    assert_same_in_onnx(program, *inputs)
    return program


def named(program: Program, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(program.outputs, outputs, strict=True))


def wrong_factors(program: Program) -> dict[str, str]:
    """Multipliers and shifts that are not those that the contract derives from the scales of the values."""
    faults = {}
    for op in program:
        for role, wanted in derived_factors(program, op).items():
            got = program.constant(op, role).flatten().tolist()
            if got != wanted:
                faults[f"{op.name}.{role}"] = f"{got}, expected {wanted}"
    return faults


def faults_of(seeds: Sequence[int], folder: Path) -> tuple[dict[int, str], Census]:
    """What is wrong with the nets of ``seeds``, by seed, and what they hold."""
    faults, census = {}, Census()
    for seed in seeds:
        net = random_net(seed)
        try:
            census.add(net, is_exact_everywhere(net, folder / str(seed)))
        except (QatError, AssertionError) as error:
            faults[seed] = str(error)
    return faults, census


@dataclass
class Census:
    """What nets hold, so that nobody has to look: numbers of nets, or of what is named."""

    nets: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    with_branches: int = 0
    with_shared_modules: int = 0
    with_mixed_formats: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, net: RandomNet, program: Program) -> None:
        self.nets += 1
        self.sizes[net.ops] += 1
        self.with_branches += net.branches > 0
        self.with_shared_modules += net.shared() > 0
        self.with_mixed_formats += any(
            {value.qtype.dtype for value in (*program.in_values(op), program.values[op.output])} >= {"int8", "int16"}
            for op in program
        )
        self.kinds.update({op.kind for op in program})


def test_random_nets_are_exact_everywhere(tmp_path: Path) -> None:
    """None is refused: each converts, and holds 10 to 40 steps."""
    faults, census = faults_of(FAST_SEEDS, tmp_path)
    assert faults == {}
    assert census.nets == len(FAST_SEEDS)
    assert {*census.sizes} <= {*range(10, 41)}
    assert min(census.with_branches, census.with_shared_modules, census.with_mixed_formats) >= 2, census


@pytest.mark.slow
def test_two_hundred_random_nets_are_exact_everywhere(tmp_path: Path) -> None:
    faults, census = faults_of(SLOW_SEEDS, tmp_path)
    assert faults == {}
    assert census.nets >= 200
    assert {*census.sizes} <= {*range(10, 41)}
    assert max(census.sizes) - min(census.sizes) >= 20, "small nets and large ones"
    assert min(census.with_branches, census.with_shared_modules, census.with_mixed_formats) >= 40, census
    never = {"conv", "linear", "conv_transpose", "matmul", "add", "mul", "cat", "table", "sum", "amax"} - {
        *census.kinds
    }
    assert never == set()


def test_a_net_is_the_same_every_time() -> None:
    first, second = random_net(5), random_net(5)
    x = first.batch(2, 0)
    assert first.qconfigs == second.qconfigs
    for a, b in zip(_flat(first.model(*x)), _flat(second.model(*x)), strict=True):
        assert torch.equal(a, b)


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
