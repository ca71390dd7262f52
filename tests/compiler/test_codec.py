"""Sections of weights: nothing is lost, the smallest form is taken, what is damaged is said to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qatlib.compiler.codec import FORMS, HEADER, DamagedSectionError, decode, encode, split
from tests.oracle import weights as oracle

Codes = NDArray[np.signedinteger]


@st.composite
def codes(draw: st.DrawFn) -> Codes:
    """int8 or int16 weights of the kinds that networks have: even, bell-shaped, few values, many zeros."""
    dtype = np.dtype(draw(st.sampled_from(["int8", "int16"])))
    count = draw(st.sampled_from([0, 1, 2, 7, 8, 64, 500]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    limits = np.iinfo(dtype)
    kind = draw(st.sampled_from(["even", "bell", "few", "sparse", "ends"]))
    if kind == "few":
        some = rng.integers(limits.min, limits.max + 1, draw(st.integers(1, 300)))
        found = rng.choice(some, count)
    elif kind == "ends":
        found = rng.choice([limits.min, -1, 0, limits.max], count)
    else:
        width = draw(st.floats(0.1, float(limits.max)))
        found = rng.integers(limits.min, limits.max + 1, count) if kind == "even" else rng.normal(0, width, count)
        if kind == "sparse":
            found = np.where(rng.random(count) < draw(st.floats(0, 0.3)), found, 0)
    return np.clip(np.rint(found), limits.min, limits.max).astype(dtype)


@settings(max_examples=80, deadline=None)
@given(codes())
def test_nothing_is_lost(given: Codes) -> None:
    section = encode(given)
    event(FORMS[section[0]])
    found = decode(section, len(given), given.dtype)
    assert found.dtype == given.dtype
    assert found.tolist() == given.tolist()
    assert oracle.section(section, len(given), given.dtype.name) == given.tolist()
    assert len(section) <= HEADER.size + given.nbytes
    assert split(section + section, 2) == [0, len(section), 2 * len(section)]


def example(form: str, dtype: str = "int8", count: int = 600) -> Codes:
    rng = np.random.default_rng(3)
    limits = np.iinfo(dtype)
    found = {
        "raw": rng.integers(limits.min, limits.max + 1, count),
        "palette": rng.choice([limits.min, -90, 0, 77, limits.max], count),
        "rice": rng.laplace(0, 6, count).clip(-100, 100),
        "runs": rng.integers(-100, 101, count) * (rng.random(count) < 0.05),
    }
    return np.rint(found[form]).astype(dtype)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_taken_where_it_is_smallest(form: str, dtype: str) -> None:
    assert FORMS[encode(example(form, dtype))[0]] == form


def test_bytes_are_those_of_the_page() -> None:
    """By hand."""
    assert encode(np.zeros(1000, np.int8)) == bytes([1, 0, 2, 0, 0, 0, 0, 0])  # a palette of 0
    two = np.array([5, -3, -3, 5, 5, 5, 5, -3], np.int8).repeat(4)
    assert encode(two) == bytes([1, 0, 7, 0, 0, 0, 1, 0xFD, 5, 0x0F, 0xF0, 0xFF, 0x0F])
    small = np.array([0, 0, -1, 0, 0, 1, 0, 0], np.int8)  # 0 0 10 0 0 110 0 0
    assert encode(small) == bytes([2, 0, 2, 0, 0, 0, 0xC4, 0x00])
    alone = np.zeros(4000, np.int8)
    alone[[3, 3999]] = 1, -1  # 3 and 3995 = 3 * 1024 + 923 zeros: 10 low bits, then 0 1110; zigzags less 1: 10 0
    section = bytes([3, 10 * 16, 8, 0, 0, 0, 2, 0, 0, 0, 0x03, 0x6C, 0x0E, 0x2E])
    assert encode(alone) == section
    assert oracle.section(section, 4000, "int8") == alone.tolist()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMS), st.integers(0, 10**6))
def test_damage_is_an_error_or_other_weights(form: str, seed: int) -> None:
    given = example(form)
    section, rng = bytearray(encode(given)), np.random.default_rng(seed)
    section[rng.integers(0, len(section))] ^= 1 << rng.integers(0, 8)
    try:
        found = decode(bytes(section), len(given), given.dtype)
    except DamagedSectionError:
        return
    assert found.shape == given.shape


@pytest.mark.parametrize("form", FORMS)
def test_what_is_too_short_or_too_long_is_refused(form: str) -> None:
    given = example(form)
    section = encode(given)
    for size in range(len(section)):
        with pytest.raises(DamagedSectionError):
            decode(section[:size], len(given), given.dtype)
    for wrong in (section + b"\0", section + b"\xff"):
        with pytest.raises(DamagedSectionError):
            decode(wrong, len(given), given.dtype)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (HEADER.pack(4, 0, 8) + bytes(8), "form 4"),
        (HEADER.pack(0, 1, 8) + bytes(8), "parameters 1"),
        (HEADER.pack(1, 0, 4) + bytes([1, 5, 6, 0xFF, 0]), "5 bytes"),
        (HEADER.pack(1, 0, 6) + bytes([2, 5, 6, 7, 0xFF, 0x55]), "takes value 3 of a palette of 3"),
        (HEADER.pack(2, 16, 0), "16 low bits"),
        (HEADER.pack(2, 7, 15) + bytes([0xFF] * 7 + [0x7F] * 8), "beyond int8"),
        (HEADER.pack(3, 0, 6) + bytes([9, 0, 0, 0, 0, 0]), "9 weights"),
        (HEADER.pack(3, 0, 6) + bytes([1, 0, 0, 0, 0xFF, 0]), "weight at 8, of 8"),
        (HEADER.pack(3, 0, 2) + bytes(2), "within its header"),
    ],
)
def test_damage_is_named(section: bytes, says: str) -> None:
    with pytest.raises(DamagedSectionError, match=says):
        decode(section, 8, np.dtype("int8"))


def test_sections_end_where_their_stream_does() -> None:
    section = encode(example("rice"))
    for data, count in ((section, 2), (section + b"\0", 1), (section[:-1], 1)):
        with pytest.raises(DamagedSectionError):
            split(data, count)
