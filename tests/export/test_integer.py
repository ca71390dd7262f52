"""The integer flavour gives the emulator's integers under ONNX Runtime: 0 differing elements in every named value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from torch import nn

from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.export import check_onnx, export_onnx
from qatlib.export.document import to_onnx
from qatlib.export.trial import behind_islands, random_inputs
from qatlib.fake.qconfig import default_calib_8bit_weight_16bit_act_fake_quant_qconfig as INT16
from qatlib.program import Program
from qatlib.qtype import INT32, DType, QType
from tests.case_builder import Case, codes, int32
from tests.export.programs import builder, program_of, run, tensors
from tests.models import everything, images, model
from tests.onnx_runtime import differing
from tests.strategies import KINDS, cases, chains

FAST = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SLOW = settings(FAST, max_examples=40, derandomize=False, print_blob=True)


def over(strategy: SearchStrategy[Case], profile: settings, check: Callable[[Case], None]) -> None:
    @profile
    @given(case=strategy)
    def generated(case: Case) -> None:
        check(case)

    generated()


def equals_emulator(case: Case) -> None:
    assert differing(case.program, tensors(case)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_one_op_equals_the_emulator(kind: str) -> None:
    over(cases(kind), FAST, equals_emulator)


def test_a_chain_equals_the_emulator() -> None:
    over(chains(), FAST, equals_emulator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_op_equals_the_emulator_on_many_cases(kind: str) -> None:
    over(cases(kind), SLOW, equals_emulator)


@pytest.mark.slow
def test_many_chains_equal_the_emulator() -> None:
    over(chains(), SLOW, equals_emulator)


def test_the_sample_saturates_and_splits_int16() -> None:
    """What the properties above rest on occurs among their cases."""
    seen: Counter[str] = Counter()

    def look(case: Case) -> None:
        (op,) = (op for op in case.program if op.kind in ("conv", "linear"))
        trace = emulate(case.program, tensors(case), trace=True)[1]
        seen["int16"] += case.program.values[op.inputs[0]].qtype.dtype == "int16"
        seen["saturated"] += trace[op.output].dtype == torch.int32 and bool((trace[op.output] == 2**31 - 1).any())

    for kind in ("conv", "linear"):
        over(cases(kind), FAST, look)
    assert all(seen[what] for what in ("int16", "saturated")), seen


# -- by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["min", "max", "uniform"])
def test_an_int16_convolution_with_padding_groups_and_dilation(axes: int, pattern: str) -> None:
    """Padding is code 0: neither byte of it may add anything, whatever the zero point of the low byte."""
    b = builder()
    x = b.feed((4, *[5] * axes), QType("int16", 0.5), pattern)
    weight = torch.from_numpy(codes(b.rng, pattern, (6, 2, *[3] * axes), -128, 127).astype(np.int8))
    attrs = {"stride": [2] * axes, "padding": [[2, 1]] * axes, "dilation": [2] * axes, "groups": 2}
    y = b.emit("conv", [x], (-1, 6, *[2] * axes), INT32, {**attrs, "acc_bound": 0}, weight=weight, bias=int32([1] * 6))
    equals_emulator(b.finish(y))


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_accumulator_saturates_once_at_the_end(sign: int) -> None:
    """Channel 0 passes int32; in channel 1 the first half alone would, and the second half brings it back."""
    b = builder()
    x = b.feed((700, 1, 1), QType("int16", 0.5), "max" if sign > 0 else "min")
    weight = torch.full((2, 700, 1, 1), 127, dtype=torch.int8)
    weight[1, 350:] = -127
    attrs = {"stride": [1, 1], "padding": [[0, 0], [0, 0]], "dilation": [1, 1], "groups": 1, "acc_bound": 2**32}
    y = b.emit("conv", [x], (-1, 2, 1, 1), INT32, attrs, weight=weight, bias=int32([5, 5]))
    case = b.finish(y)
    (out,) = emulate(case.program, tensors(case))
    assert out.flatten().tolist()[:2] == [2**31 - 1 if sign > 0 else -(2**31), 5]
    equals_emulator(case)


@pytest.mark.parametrize(("dtype", "channels"), [("int8", 140_000), ("int16", 70_000)])
@pytest.mark.parametrize("pattern", ["min", "uniform"])
def test_channels_are_cut_within_their_groups_where_bytes_would_pass_int32(
    dtype: DType, channels: int, pattern: str
) -> None:
    b = builder(batch=1)
    x = b.feed((2 * channels, 1), QType(dtype, 0.5), pattern)
    weight = torch.from_numpy(codes(b.rng, "min", (2, channels, 1), -128, 127).astype(np.int8))
    attrs = {"stride": [1], "padding": [[0, 0]], "dilation": [1], "groups": 2, "acc_bound": 2**33}
    y = b.emit("conv", [x], (-1, 2, 1), INT32, attrs, weight=weight, bias=int32([0] * 2))
    case = b.finish(y)
    kinds = Counter(node.op_type for node in to_onnx(case.program).graph.node)
    assert kinds["ConvInteger"] == {"int8": 2, "int16": 4}[dtype]
    equals_emulator(case)


def test_a_kernel_that_cannot_be_cut_is_refused() -> None:
    b = builder(batch=1)
    x = b.feed((1, 70_000), QType("int16", 0.5), "min")
    weight = torch.full((1, 1, 70_000), -128, dtype=torch.int8)
    attrs = {"stride": [1], "padding": [[0, 0]], "dilation": [1], "groups": 1, "acc_bound": 2**33}
    y = b.emit("conv", [x], (-1, 1, 1), INT32, attrs, weight=weight, bias=int32([0]))
    with pytest.raises(ProgramError, match="QAT220 conv0: the taps of one input channel"):
        to_onnx(b.finish(y).program)


# -- whole models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> Program:
    return program_of(everything(), images(8))


def test_a_model_is_equal_at_every_value_and_batch_size(bundled: Program, tmp_path: Path) -> None:
    export_onnx(bundled, tmp_path / "net.onnx")
    for batch in (1, 7):
        x = images(batch, seed=batch)
        assert set(check_onnx(bundled, tmp_path / "net.onnx", x).values()) == {0}
        np.testing.assert_array_equal(run(tmp_path / "net.onnx", x)[0], emulate(bundled, x)[0].numpy())


def test_a_model_of_int16_activations_is_equal() -> None:
    program = program_of(everything(), images(8), qconfig_dict=INT16)
    assert {value.qtype.dtype for value in program.values.values()} == {"float32", "int16", "int32"}
    assert differing(program, [images(5, seed=5)]) == {}


@pytest.mark.parametrize("opset", [18, 19, 23])
def test_other_opsets_give_the_same(bundled: Program, tmp_path: Path, opset: int) -> None:
    export_onnx(bundled, tmp_path / "net.onnx", opset=opset)
    assert set(check_onnx(bundled, tmp_path / "net.onnx", images(3)).values()) == {0}


def test_a_planted_fault_is_counted(bundled: Program, tmp_path: Path) -> None:
    """A weight off by one changes the value it makes and what follows, nothing before."""
    path = tmp_path / "net.onnx"
    document = export_onnx(bundled, path)
    (weight,) = (tensor for tensor in document.graph.initializer if tensor.name == "hidden.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, :] += np.where(array < 127, 1, -1).astype(np.int8)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(document, path)
    counts = check_onnx(bundled, path, images(4))
    assert counts["hidden"] > 0
    assert counts["head.dequant"] > 0
    assert counts["view"] == counts["stem"] == 0


# -- float islands -----------------------------------------------------------------------------------------------

BUNDLED_OPS = ("stem", "block.conv", "depthwise", "smooth", "add", "cat", "shrink", "pool", "hidden", "head")


@pytest.mark.parametrize("name", BUNDLED_OPS)
def test_an_island_comes_close_and_nothing_before_it_moves(name: str, tmp_path: Path) -> None:
    program = program_of(everything(), images(8), preserve=(name,))
    assert [op.name for op in program.islands()] == [name]
    path, x = tmp_path / "net.onnx", images(4, seed=4)
    export_onnx(program, path)
    counts = check_onnx(program, path, x)
    soft = behind_islands(program)
    assert name in soft
    assert not any(count for value, count in counts.items() if value not in soft)
    want = emulate(program, x)[0].numpy()
    assert np.abs(run(path, x)[0] - want).max() < 0.02 * np.abs(want).max()


def test_islands_that_only_move_are_exact() -> None:
    net = model(lambda m, x: m.conv(x).relu().permute(0, 2, 3, 1).reshape(x.size(0), -1), conv=nn.Conv2d(3, 4, 1))
    program = program_of(net, images(4))
    movers = tuple(op.name for op in program if op.kind in ("permute", "reshape"))
    kept = program_of(net, images(4), preserve=movers)
    assert len(kept.islands()) == len(movers) == 2
    assert differing(kept, random_inputs(kept)) == {}
