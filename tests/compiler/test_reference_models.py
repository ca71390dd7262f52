"""Tiled = untiled for the reference models, down to the smallest memories that a target may have."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bench import models
from examples.detector.model import build as detector
from examples.efficientnet_lite0.model import build as efficientnet_lite0
from examples.hard_case.model import build as hard_case
from examples.recurrent.model import build as recurrent
from examples.warp.model import build as warp
from qatlib.compiler import Target, compile_model, load_target, try_compile
from qatlib.compiler.hardware import fill
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.program import Program
from tests.models import calibrated

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobilenet_v2": (models.MobileNetV2, (3, 64, 64)),
    "resnet18": (models.ResNet18, (3, 48, 48)),
    "efficientnet_lite0": (efficientnet_lite0, (3, 64, 64)),
    "detector": (detector, (1, 64, 64)),
    "warp": (warp, (1, 28, 28)),
    "gru": (recurrent, (1, 28, 28)),
    "lstm": (functools.partial(recurrent, "lstm"), (1, 28, 28)),
    "hard_case": (hard_case, (1, 28, 28)),
}
SAMPLES = 32


@functools.cache
def reference(name: str) -> tuple[Program, Tensor, tuple[Tensor, ...]]:
    """The model, inputs, and what the untiled Program makes of them."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    network, images = build().eval(), torch.randn(SAMPLES, *shape)
    program = to_program(calibrated(network, images[:4]))
    return program, images, emulate(program, images)


def assert_equal(name: str, target: Target) -> None:
    program, images, expected = reference(name)
    for ours, theirs in zip(compile_model(program, target).run(images), expected, strict=True):
        assert ours.shape == theirs.shape
        assert int((ours != theirs).sum()) == 0


def changed(target: Target, part: str, **values: int | None) -> Target:
    """The target with other memories; ValidationError for one that it cannot be."""
    document = target.model_dump()
    document[part] |= values
    return Target.model_validate(document)


def smallest_buffer(target: Target) -> Target:
    """The target with as little room for inputs as two tiles of it take."""
    for size in itertools.count(16, 16):
        with contextlib.suppress(ValidationError):
            return changed(target, "buffers", input_bytes=size)
    raise AssertionError


pytestmark = pytest.mark.slow
EVERY = pytest.mark.parametrize("name", MODELS)


@EVERY
@pytest.mark.parametrize(("target", "sram"), [("bayes-like", 0), ("bayes-like", 24576), ("ethos-u55-256-like", 32768)])
def test_tiled_equals_untiled(name: str, target: str, sram: int) -> None:
    found = load_target(target)
    if try_compile(reference(name)[0], found)[1]:
        pytest.skip(f"{target} has not all kinds of {name}")
    assert_equal(name, changed(found, "sram", bytes=sram) if sram else found)


@EVERY
def test_the_smallest_sram_holds_one_tile(name: str) -> None:
    target = load_target("bayes-like")
    array, step = target.mac_array, target.sram.alignment
    tiles = [*array.tiles, *(array.own_channel_tiles or ()), *((array.row_tile,) if array.row_tile else ())]
    least = fill(max(map(math.prod, tiles)), step)
    assert_equal(name, changed(target, "sram", bytes=least, banks=None))
    with pytest.raises(ValidationError, match=r"one tile \d+x\d+x\d+ of mac_array has \d+ bytes"):
        changed(target, "sram", bytes=least - step, banks=None)


@EVERY
def test_the_smallest_buffers_hold_one_block_of_the_op_that_needs_most(name: str) -> None:
    program, *_ = reference(name)
    target = load_target("bayes-like")
    least = smallest_buffer(target)
    _, refused = try_compile(program, least)
    needs = {v.op: int(found[1]) for v in refused if (found := re.search(r"buffers of (\d+) bytes for inputs", v.seen))}
    assert len(needs) == len(refused)
    op, most = max(needs.items(), key=lambda one: one[1], default=("", 0))
    if not needs:
        assert_equal(name, least)
        return
    assert_equal(name, changed(target, "buffers", input_bytes=most))
    executable, (violation, *_) = try_compile(program, changed(target, "buffers", input_bytes=most - 1))
    assert executable is None
    assert (violation.code, violation.op) == ("QAT186", op)
    assert f"needs buffers of {most} bytes for inputs" in violation.seen
