"""What a run takes, what it gives away, and what it says of a Program or an input that means nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import convert_fx, to_program
from qatlib.emulator import Emulator, emulate
from qatlib.errors import ProgramError
from qatlib.program import Op, Program, Value
from qatlib.qtype import QType
from tests.kind_nets import IDS, MASK, NETS, ROWS
from tests.models import calibrated, images, model


@pytest.fixture(scope="module")
def masks() -> Program:
    return NETS["masks"].program()


@pytest.fixture(scope="module")
def conv() -> Program:
    return to_program(calibrated(model(lambda s, x: s.conv(x).relu(), conv=nn.Conv2d(3, 4, 3)), images(4)))


def codes_of(dtype: Any, scale: float = 0.5) -> Program:
    """One reshape of integer codes."""
    qtype = QType(dtype, scale)
    values = {"x": Value("x", (-1, 4), qtype), "y": Value("y", (-1, 2, 2), qtype)}
    return Program(("x",), ("y",), (Op("reshape", "y", ("x",), {"shape": [-1, 2, 2]}),), values, {})


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "seen"),
    [
        ((), r"inputs: got 0 tensors for 2 inputs \['x', 'y'\]"),
        (ROWS, "inputs: got 1 tensors for 2"),
        ((ROWS.numpy(), MASK), "x: is a ndarray"),
        (ROWS.numpy(), "inputs: got 1 tensors for 2"),
        ((ROWS[:, :5], MASK), r"x: has shape \[3, 5, 8\], expected \[-1, 6, 8\]"),
        ((ROWS.long(), MASK), "x: has dtype torch.int64, expected float32"),
        ((ROWS, ROWS), "y: has dtype torch.float32, expected bool"),
        ((ROWS, MASK.to(torch.complex64)), "y: has dtype torch.complex64"),
        ((ROWS, MASK.long() * 256), rf"y: holds 256 at .*, and {int(MASK.sum())} of 144 elements lie outside \[0, 1\]"),
        ((ROWS, -MASK.long()), r"y: holds -1 at .* lie outside \[0, 1\]. Give integers from 0 to 1"),
        ((ROWS, MASK[:2]), "inputs: have different batch sizes, 2 in 'y' and 3 in 'x'"),
        ((ROWS, MASK[:1]), "inputs: have different batch sizes, 1 in 'y' and 3 in 'x'"),
    ],
)
def test_inputs_that_do_not_fit_are_named(masks: Program, inputs: Any, seen: str) -> None:
    with pytest.raises(ProgramError, match=f"QAT180 {seen}"):
        emulate(masks, inputs)


def test_integer_inputs_may_have_any_dtype_that_holds_them(masks: Program) -> None:
    wanted = emulate(masks, (ROWS, MASK))
    for mask in (MASK.to(torch.uint8), MASK.to(torch.int8), MASK.long()):
        assert all(torch.equal(a, b) for a, b in zip(emulate(masks, [ROWS, mask]), wanted, strict=True))


@pytest.mark.parametrize("beyond", [2**31, 2**40, -(2**31) - 1, torch.iinfo(torch.int64).max])
def test_ids_beyond_int32(beyond: int) -> None:
    program, ids = NETS["embedding of ids"].program(), IDS.clone()
    ids[1, 2] = beyond
    with pytest.raises(
        ProgramError, match=rf"QAT180 x: holds {beyond} at \[1, 2\], and 1 of 15 elements .*\[-2147483648, 2147483647\]"
    ):
        emulate(program, ids)


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", -128, 127), ("int16", -32768, 32767)])
def test_codes_reach_to_the_ends_of_their_format_and_no_further(
    dtype: str, least: int, most: int, scale: float, tmp_path: Path
) -> None:
    """Also int8 codes of scale 1, which are no truth values; a Program says in its file which it has."""
    codes_of(dtype, scale).save(tmp_path / "program")
    program = Program.load(tmp_path / "program")
    x = torch.tensor([[least, most, 0, 1]])
    assert torch.equal(emulate(program, x)[0].flatten(), x.flatten())
    for beyond in (least - 1, most + 1):
        with pytest.raises(ProgramError, match=rf"QAT180 x: holds {beyond} at \[0, 0\]"):
            emulate(program, torch.tensor([[beyond, 0, 0, 0]]))


def test_an_empty_batch_has_empty_outputs() -> None:
    assert emulate(codes_of("int8"), torch.zeros(0, 4, dtype=torch.int8))[0].shape == (0, 2, 2)


# -- NaN ---------------------------------------------------------------------------------------------------------------


def logarithm() -> tuple[nn.Module, Tensor]:
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) + 0.1
    return model(lambda s, x: s.fc(torch.log(x)), fc=nn.Linear(6, 3)), x


@pytest.mark.parametrize(
    ("options", "kept", "where"),
    [({}, ("log",), "log: holds 12 NaN of 12"), ({"hybrid": True, "hybrid_dict": {"module_name": ["log"]}}, (), "log")],
)
def test_nan_out_of_a_float_island_never_becomes_integers(
    options: dict[str, Any], kept: tuple[str, ...], where: str
) -> None:
    net, x = logarithm()
    program = to_program(calibrated(net, x, **options), kept)
    assert emulate(program, x)[0].isfinite().all()
    with pytest.raises(ProgramError, match=f"QAT181 {where}"):
        emulate(program, -x[:2], trace=True)


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_outputs_may_be_changed_and_trained_on(conv: Program) -> None:
    x = images(2)
    wanted = emulate(conv, x)[0].clone()
    (out,) = emulate(conv, x)
    out.mul_(2).add_(1)
    assert torch.equal(out, wanted * 2 + 1)
    head = nn.Conv2d(4, 2, 1)
    head(convert_fx(calibrated(model(lambda s, x: s.conv(x), conv=nn.Conv2d(3, 4, 3)), x))(x)).sum().backward()
    assert head.weight.grad is not None


def test_an_output_is_the_callers_own() -> None:
    """Also the input itself and a view of it, which pass through in float."""
    x = images(2).requires_grad_()
    before = x.detach().clone()
    shown = model(lambda s, x: (x, x.flatten(1)))
    emulator = Emulator(to_program(calibrated(shown, images(2), qconfig_dict={"": None}, hybrid=True)))
    same, flat = emulator(x)
    assert torch.equal(flat, before.flatten(1))
    assert not same.requires_grad
    same.zero_()
    flat.zero_()
    assert torch.equal(x, before)


# -- Programs that cannot be run ---------------------------------------------------------------------------------------


def changed(program: Program, name: str, **fields: Any) -> Program:
    return replace(program, ops=tuple(replace(op, **fields) if op.name == name else op for op in program))


def without(mapping: Any, key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


BREAKS: dict[str, Callable[[Op, Program], Program]] = {
    "no lo": lambda op, program: changed(program, op.name, attrs=without(op.attrs, "lo")),
    "no stride": lambda op, program: changed(program, op.name, attrs=without(op.attrs, "stride")),
    "no weight": lambda op, program: changed(program, op.name, consts=without(op.consts, "weight")),
    "no input": lambda op, program: changed(program, op.name, inputs=()),
    "a bias of another length": lambda op, program: replace(
        program, constants=dict(program.constants) | {op.consts["bias"]: torch.zeros(7, dtype=torch.int32)}
    ),
}


@pytest.mark.parametrize("damage", BREAKS.values(), ids=BREAKS.keys())
def test_an_op_that_lacks_what_it_needs_is_named(conv: Program, damage: Callable[[Op, Program], Program]) -> None:
    (op,) = (op for op in conv if op.kind == "conv")
    with pytest.raises(ProgramError, match=f"QAT174 {op.name}: is no conv that can be computed") as caught:
        Emulator(damage(op, conv))
    assert caught.value.__cause__ is not None


def test_an_op_of_a_newer_version_is_named(conv: Program, tmp_path: Path) -> None:
    changed(conv, "conv", kind="fourier").save(tmp_path / "program")
    newer = Program.load(tmp_path / "program")
    with pytest.raises(ProgramError, match="QAT182 conv: op kind 'fourier' is unknown"):
        emulate(newer, images(1))


def test_a_refusal_of_the_contract_keeps_its_code(conv: Program) -> None:
    (op,) = (op for op in conv if op.kind == "conv")
    largest = {op.consts[role]: torch.full((4,), 2**31 - 1, dtype=torch.int32) for role in ("bias", "multiplier")}
    with pytest.raises(ProgramError, match="QAT176"):
        Emulator(replace(conv, constants=dict(conv.constants) | largest))
