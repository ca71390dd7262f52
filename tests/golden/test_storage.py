"""How a device stores a tensor is told from what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatlib.conversion import convert_fx
from qatlib.golden import Golden, load_golden, write_golden
from qatlib.golden.layout import same_axes
from tests.golden.planting import (
    Array,
    Fault,
    again,
    blocks,
    channels_last,
    clamped,
    exact,
    floor,
    padded,
    parted,
    status,
)
from tests.models import calibrated, model


def _stored(name: str, how: Callable[[Array], Any], kinds: str, said: str) -> Fault:
    return Fault(name, lambda golden: how(golden.tensors[name]), kinds, said)


STORED = {
    "channels last": _stored("stem", channels_last, "layout", "NHWC"),
    "channels last, raw": _stored("stem", lambda x: channels_last(x).tobytes(), "layout", "NHWC"),
    "transposed": _stored("hidden", lambda x: x.T, "layout", "CN"),
    "any order of axes": _stored("cat", lambda x: x.transpose(3, 0, 2, 1), "layout", "WNHC"),
    "channel blocks": _stored("cat", lambda x: blocks(x).tobytes(), "layout", "blocks of 4"),
    "merged channels last": _stored(
        "view",
        lambda x: channels_last(x.reshape(-1, 16, 5, 5)).reshape(len(x), -1),
        "layout",
        "merged in the order NHWC",
    ),
    "padded channels": _stored("stem", padded, "padding", "axis C is padded"),
    "padded channels last, raw": _stored(
        "stem", lambda x: channels_last(padded(x)).tobytes(), "layout", "axis C is padded"
    ),
    "zero point 128": _stored(
        "stem", lambda x: (x.astype(np.int16) + 128).astype(np.uint8), "zero_point", "zero point 128"
    ),
    "zero point, raw": _stored(
        "block.conv", lambda x: (x.astype(int) + 128).astype(np.uint8).tobytes(), "zero_point", "128"
    ),
    "read as unsigned": _stored("depthwise", lambda x: x.view(np.uint8), "dtype", "unsigned"),
    "read as int16": _stored("stem", lambda x: x.reshape(-1).view(np.int16), "dtype", "those of int8"),
    "raw int16": _stored("stem", lambda x: x.astype(np.int16).tobytes(), "dtype", "stored as int16"),
    "big endian": _stored("head", lambda x: x.astype(">i4").tobytes(), "byte_order", "big endian"),
    "big endian floats": _stored("head.dequant", lambda x: x.astype(">f4").tobytes(), "byte_order", "big endian"),
    "real numbers": Fault(
        "hidden",
        lambda golden: golden.tensors["hidden"] * np.float32(golden.by_name["hidden"].scale),
        "dequantized",
        "codes times the scale",
    ),
    "codes of a float output": Fault("head.dequant", lambda golden: golden.tensors["head"], "dequantized", "codes"),
}


@pytest.mark.parametrize("fault", STORED.values(), ids=STORED.keys())
def test_a_tensor_that_is_only_stored_otherwise(golden: Golden, tmp_path: Path, fault: Fault) -> None:
    comparison = fault.check(golden, tmp_path)
    assert comparison.first_numbers is None
    assert status(comparison)[fault.name] == "stored otherwise"


@pytest.mark.parametrize(
    "store",
    [
        lambda x: channels_last(padded(x, 16)),
        lambda x: channels_last(padded(x, 16)).tobytes(),
        lambda x: blocks(x).tobytes(),
        lambda x: padded(x, 16),
        channels_last,
        lambda x: channels_last(x)[0],
    ],
    ids=["padded npy", "padded bin", "blocks", "padded, channels second", "npy", "no batch axis"],
)
def test_one_sample_of_a_batch_stored_otherwise(golden: Golden, tmp_path: Path, store: Callable[[Array], Any]) -> None:
    comparison = parted(golden, tmp_path, {"stem": store(golden.tensors["stem"][:1])})
    assert status(comparison)["stem"] == "stored otherwise"
    assert {(r.name, r.samples) for r in comparison.tensors if r.samples != golden.batch} == {("stem", 1)}


@pytest.mark.parametrize("value", [255, -1])
def test_truth_values_with_all_bits_set(island: Golden, tmp_path: Path, value: int) -> None:
    (name,) = (entry.name for entry in island.entries if entry.kind == "compare")
    comparison = parted(island, tmp_path, {name: island.tensors[name].astype(np.int16) * value})
    assert status(comparison)[name] == "stored otherwise"


@pytest.mark.parametrize(
    ("seen", "stored", "same"),
    [
        (None, (2, 3, 4), True),
        ((24,), (2, 3, 4), True),
        ((2, 12), (2, 3, 4), True),
        ((2, 3, 2, 2), (2, 3, 4), True),
        ((3, 4), (1, 3, 4), True),
        ((2, 3, 4, 1), (2, 3, 4), True),
        ((6, 4), (2, 3, 4), False),
        ((4, 6), (2, 3, 4), False),
        ((2, 4, 3), (2, 3, 4), False),
        ((), (), True),
    ],
)
def test_the_shape_that_a_file_tells(seen: tuple[int, ...] | None, stored: tuple[int, ...], same: bool) -> None:
    assert same_axes(seen, stored) == same


FAR: dict[str, tuple[str, Callable[[Array], Any], str]] = {
    "float output, raw": ("head.dequant", lambda x: (x * 4).tobytes(), "scale"),
    "accumulator, raw": ("head", lambda x: (x * 4).tobytes(), "scale"),
    "negated accumulator, raw": ("head", lambda x: (-x).tobytes(), "sign"),
    "random codes, raw": (
        "hidden",
        lambda x: np.random.default_rng(0).integers(-128, 128, x.shape).astype(x.dtype).tobytes(),
        "unknown",
    ),
    "float input, raw": ("x", lambda x: (x * 255).tobytes(), "pre-processing"),
}


@pytest.mark.parametrize(("name", "change", "kind"), FAR.values(), ids=FAR.keys())
def test_numbers_far_from_the_golden_ones_are_not_taken_for_another_dtype(
    golden: Golden, tmp_path: Path, name: str, change: Callable[[Array], Any], kind: str
) -> None:
    comparison = parted(golden, tmp_path, {name: change(golden.tensors[name])})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == (name, kind)
    assert comparison.first.also == ()


def test_int16_codes_of_another_range_are_not_taken_for_another_byte_order(wide: Golden, tmp_path: Path) -> None:
    scale = np.float32(wide.by_name["x.quant"].scale)
    codes = np.clip(np.rint(wide.tensors["x"] * 255 / scale), -32768, 32767).astype(np.int16)
    comparison = parted(wide, tmp_path, {"x.quant": codes}, only=["x.quant"])
    assert comparison.first is not None
    assert comparison.first.cause.kind == "pre-processing"


def test_random_int16_codes_are_not_taken_for_floats(wide: Golden, tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(-32768, 32768, wide.tensors["c"].shape).astype(np.int16)
    comparison = parted(wide, tmp_path, {"c": random.tobytes()})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("c", "unknown")


def test_a_fault_behind_another_layout_is_found_as_what_it_is(golden: Golden, tmp_path: Path) -> None:
    """Two causes at once: all of the dump is channels last, and one op rounds down."""
    numbers = dict(golden.tensors) | {"smooth": again(golden, "smooth", floor).astype(np.int8)}
    comparison = parted(golden, tmp_path, {name: channels_last(x).tobytes() for name, x in numbers.items()})
    assert comparison.first is not None
    assert comparison.first_numbers is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("x", "layout")
    assert (comparison.first_numbers.tensor, comparison.first_numbers.cause.kind) == ("smooth", "rounding")


@pytest.mark.parametrize(
    "store",
    [
        channels_last,
        lambda x: channels_last(x).tobytes(),
        lambda x: channels_last(padded(x)),
        lambda x: (x.astype(int) + 128).astype(np.uint8),
        lambda x: x.astype(np.int32).tobytes(),
    ],
    ids=["channels last", "channels last, raw", "padded", "zero point", "int32"],
)
def test_a_fault_in_the_one_tensor_that_is_stored_otherwise(
    golden: Golden, tmp_path: Path, store: Callable[[Array], Any]
) -> None:
    """Numbers four times too large are far from the golden ones in every storage: the cause that fits decides."""
    planted = {
        "rounding": again(golden, "stem", floor).astype(np.int8),
        "scale": clamped(golden, "stem", 4 * exact(golden, "stem")),
    }
    for kind, codes in planted.items():
        (tmp_path / kind).mkdir()
        comparison = parted(golden, tmp_path / kind, {"stem": store(codes)})
        assert comparison.first is not None
        assert comparison.first_numbers is not None
        assert (comparison.first_numbers.tensor, comparison.first_numbers.cause.kind) == ("stem", kind)
        assert comparison.first.cause.kind in ("layout", "dtype", "zero_point")


def test_equal_tensors_behind_the_first_difference_are_not_said_to_differ(golden: Golden, tmp_path: Path) -> None:
    changed = {"x": golden.tensors["x"] * 2} | {n: channels_last(golden.tensors[n]).tobytes() for n in ("stem", "cat")}
    states = status(parted(golden, tmp_path, changed))
    assert {name: state for name, state in states.items() if state != "equal"} == {
        "x": "differs",
        "stem": "stored otherwise",
        "cat": "stored otherwise",
    }


def test_a_few_truth_values_are_no_evidence_of_a_layout(tmp_path: Path) -> None:
    """Two samples of two truth values: the transposed ones are equal by chance."""
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    write_golden(convert_fx(calibrated(model(lambda s, x: x > 0), x)).program, x, tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    (name,) = (entry.name for entry in golden.entries if entry.kind == "compare")
    comparison = parted(golden, tmp_path, {name: golden.tensors[name].T})
    assert status(comparison)[name] == "differs"
