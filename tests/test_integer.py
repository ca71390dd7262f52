"""Routes of the exact arithmetic that this machine would not take by itself."""

from __future__ import annotations

import math

import pytest
import torch

from qatlib import integer
from qatlib.errors import ProgramError
from qatlib.factors import fused_factors
from qatlib.integer import EXACT_FLOAT32, Geometry, Requantizer, convolve, exact_kernels, power_of_two
from qatlib.ops.accumulator import _splits


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_matrices_of_patches_equal_the_convolution(axes: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(axes)
    x = torch.randint(-128, 128, (3, 4, *[9] * axes), generator=generator).double()
    weight = torch.randint(-128, 128, (6, 4 // groups, *[3] * axes), generator=generator).double()
    bias = torch.randint(-999, 999, (6,), generator=generator).double()
    geometry = Geometry((2,) * axes, ((1, 0),) * axes, (2,) * axes, groups)
    direct = convolve(x, weight, bias, geometry)
    monkeypatch.setattr(integer, "convolution_is_direct", lambda device: False)
    assert torch.equal(convolve(x, weight, bias, geometry), direct)


def test_settings_that_would_lose_bits_are_off_inside_and_back_outside() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_kernels():
            assert torch.get_float32_matmul_precision() == "highest"
            product = torch.full((4, 300), 127.0) @ torch.full((300, 4), 127.0)
            assert product.dtype == torch.float32
            assert bool((product == 300 * 127 * 127).all())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_beyond_float64_are_refused() -> None:
    with pytest.raises(ProgramError, match="QAT176"):
        Requantizer.plan([torch.tensor([2**21 - 1])], torch.tensor([20]), [2**33], -128, 127)


@pytest.mark.parametrize(("r1", "r2"), [(1e-3, 1.0), (2.0**-20, 1.0), (0.9, 1e-3), (3e-6, 700.0), (0.3, 2000.0)])
@pytest.mark.parametrize("bits", [8, 20, 21])
def test_factors_of_an_addend_by_the_contract(r1: float, r2: float, bits: int) -> None:
    """Section 4: checked against its sentences, with Python integers."""
    m1, m2, n = fused_factors(r1, r2, bits, "op")
    assert m2 < 2**31
    assert (m2 & -m2) * 2**bits >= m2, "at most `bits` significant bits"
    assert abs(m2 - r2 * 2**n) <= max(0.5, r2 * 2**n * 2.0**-bits)
    assert m1 == round(r1 * 2**n)
    full = 2 ** (bits - 1) <= m1 < 2**bits
    assert full or (m1 < 2 ** (bits - 1) and r2 * 2 ** (n + 1) >= 2**31 - 0.5), "fewer bits only where r2 asks for it"


@pytest.mark.parametrize("channels", [1, 70, 300, 700, 900])
def test_chunks_of_channels_are_the_longest_that_are_exact(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    magnitude = torch.randint(0, 129, (5, channels), generator=generator)
    largest, found = 2**11, []
    for channel in range(channels):
        longer = magnitude[:, channel - (found[-1] if found else 0) : channel + 1]
        if not found or int(longer.sum(1).max()) * largest >= EXACT_FLOAT32:
            found.append(0)
        found[-1] += 1
    assert _splits(magnitude, largest, True) == (tuple(found) if len(found) <= max(1, min(8, channels // 64)) else ())
    assert _splits(magnitude, largest, False) == (tuple(found) if len(found) == 1 else ())


def test_powers_of_two() -> None:
    exponents = range(-1022, 1024)
    assert power_of_two(torch.tensor(exponents, dtype=torch.int32)).tolist() == [math.ldexp(1, e) for e in exponents]
