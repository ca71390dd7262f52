"""Faults that are found by the numbers alone: at ops that are not computed again, and whatever the op is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qatlib.golden import Golden
from tests.golden.planting import Array, Fault, clamped, exact


def _noise(x: Array) -> Array:
    return np.random.default_rng(0).integers(-128, 128, x.shape).astype(np.int8)


def _one_channel(g: Golden) -> Array:
    wrong = g.tensors["cat"].copy()
    wrong[:, 5] = _noise(wrong[:, 5])
    return wrong


def _never_rounded(g: Golden) -> Array:
    op = g.ops["depthwise"]
    real = np.clip(exact(g, "depthwise"), op.attrs["lo"], op.attrs["hi"])
    return (real * g.by_name["depthwise"].scale).astype(np.float32)


CODES: dict[str, Fault] = {
    "a buffer of zeros": Fault("stem", lambda g: g.tensors["stem"] * 0, "constant", "holds 0 everywhere"),
    "an input of zeros": Fault("x", lambda g: np.zeros_like(g.tensors["x"]), "constant", "holds 0 everywhere"),
    "a buffer of sevens": Fault("shrink", lambda g: np.full_like(g.tensors["shrink"], 7), "constant", "holds 7"),
    "negated": Fault("head", lambda g: -g.tensors["head"], "sign", "negated"),
    "a narrower range": Fault("shrink", lambda g: np.clip(g.tensors["shrink"], -20, 20), "saturation", "[-20, 20]"),
    "an offset of codes": Fault(
        "cat", lambda g: np.clip(g.tensors["cat"].astype(int) + 3, -128, 127), "zero_point", "golden +3"
    ),
    "an offset of accumulators": Fault("head", lambda g: g.tensors["head"] + 1, "offset", "golden +1"),
    "half the codes": Fault("shrink", lambda g: np.rint(g.tensors["shrink"] * 0.5), "scale", "0.5 (2^-1)"),
    "codes times four, saturated": Fault(
        "stem", lambda g: np.clip(g.tensors["stem"].astype(int) * 4, -128, 127), "scale", "4 (2^2)"
    ),
    "twice a float output": Fault("head.dequant", lambda g: g.tensors["head.dequant"] * 2, "scale", "2 (2^1)"),
    "never rounded": Fault("depthwise", _never_rounded, "dequantized", "never rounded"),
    "the last bits of a float output": Fault(
        "head.dequant",
        lambda g: np.nextafter(g.tensors["head.dequant"], np.float32(np.inf)),
        "float_rounding",
        "last place",
    ),
    "the last bits of an input": Fault(
        "x", lambda g: np.nextafter(g.tensors["x"], np.float32(9)), "float_rounding", "last place"
    ),
    "a float16 input": Fault("x", lambda g: g.tensors["x"].astype(np.float16), "float_rounding", "float16"),
    "a bfloat16 output": Fault(
        "head.dequant",
        lambda g: torch.tensor(g.tensors["head.dequant"]).bfloat16().float().numpy(),
        "float_rounding",
        "bfloat16",
    ),
    "samples written in another order": Fault("hidden", lambda g: g.tensors["hidden"][::-1], "batch_order", "4, 3, 2"),
    "samples of an op that was not seen": Fault(
        "hidden", lambda g: g.tensors["hidden"][[1, 1, 1, 1, 1]], "wrong_input", "1, 1, 1, 1, 1", ("view",)
    ),
    "random codes": Fault("hidden", lambda g: _noise(g.tensors["hidden"]), "unknown", "no other rounding"),
    "one wrong channel": Fault("cat", _one_channel, "unknown", "1 of 16, first 5"),
    "one sample everywhere, of inputs that are right": Fault(
        "hidden", lambda g: g.tensors["hidden"][[1, 1, 1, 1, 1]], "unknown"
    ),
    "not a number": Fault(
        "cat", lambda g: np.where(g.tensors["cat"] == 3, np.nan, g.tensors["cat"]), "unknown", "not_finite"
    ),
    "an input that is not a number": Fault(
        "x", lambda g: np.where(g.tensors["x"] > 1, np.nan, g.tensors["x"]), "unknown", "not_finite"
    ),
}


@pytest.mark.parametrize("fault", CODES.values(), ids=CODES.keys())
def test_a_fault_of_numbers(golden: Golden, tmp_path: Path, fault: Fault) -> None:
    comparison = fault.check(golden, tmp_path)
    assert comparison.first == comparison.first_numbers


def test_what_is_unknown_says_where_and_how_far(golden: Golden, tmp_path: Path) -> None:
    comparison = CODES["one wrong channel"].check(golden, tmp_path)
    wrong, wanted = _one_channel(golden).astype(int), golden.tensors["cat"].astype(int)
    result = next(r for r in comparison.tensors if r.name == "cat")
    distance = np.abs(wrong - wanted)
    assert (result.max_distance, result.mean_distance) == (distance.max(), pytest.approx(distance.mean()))
    assert (result.differing, result.elements) == ((wrong != wanted).sum(), wrong.size)
    assert comparison.first is not None
    evidence = comparison.first.cause.evidence
    assert evidence["share_above"] == pytest.approx((wrong > wanted).mean())
    assert evidence["mean_signed_distance"] == pytest.approx((wrong - wanted).mean())


ISLAND: dict[str, Fault] = {
    "truth values inverted": Fault("gt", lambda g: 1 - g.tensors["gt"], "sign", "inverted"),
    "a mask of zeros": Fault("gt", lambda g: g.tensors["gt"] * 0, "constant"),
    "another position": Fault("argmax", lambda g: (g.tensors["argmax"] + 7) % 11, "unknown"),
    "a code of a float island": Fault(
        "c", lambda g: g.tensors["c"] + (np.arange(g.tensors["c"].size).reshape(g.tensors["c"].shape) == 9), "unknown",
        "a float island",
    ),
    "half of a float island": Fault("log", lambda g: g.tensors["log"] / 2, "scale", "0.5"),
    "a float island in float16": Fault("log", lambda g: g.tensors["log"].astype(np.float16), "float_rounding"),
    "another float island": Fault("log", lambda g: np.tanh(g.tensors["log"]), "unknown", "a float island"),
    "a quantize behind an island, of what was not seen": Fault(
        "log.quant", lambda g: np.clip(np.rint(g.tensors["log.quant"] * 0.8 + 5), -128, 127), "unknown", "", ("log",)
    ),
    "channels of a quantize behind an island": Fault(
        "log.quant", lambda g: g.tensors["log.quant"][:, ::-1], "unknown", "", ("log",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ISLAND.values(), ids=ISLAND.keys())
def test_a_fault_of_truth_values_positions_and_islands(island: Golden, tmp_path: Path, fault: Fault) -> None:
    fault.check(island, tmp_path)


def test_codes_of_an_op_that_is_not_computed_again_wrap(narrow: Golden, tmp_path: Path) -> None:
    """Only signs tell it: what the codes were beyond their limits is not known."""
    raw = np.rint(exact(narrow, "c")).astype(np.int64)
    flat = narrow.tensors["flatten"]
    assert np.array_equal(clamped(narrow, "c", raw).reshape(flat.shape), flat)
    fault = Fault("flatten", lambda g: raw.astype(np.int8).reshape(flat.shape), "saturation", "as codes that wrap do")
    first = fault.check(narrow, tmp_path).first
    assert first is not None
    assert first.cause.evidence["differing_at_limits"] == (raw.astype(np.int8).reshape(flat.shape) != flat).sum()
