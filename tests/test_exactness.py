"""The emulator equals the oracle: 0 differing elements, in every named value of every generated Program.

The default run is a small fixed sample; ``-m slow`` runs more than 2,000 fresh cases of the same properties.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from qatlib import integer
from qatlib.emulator import Emulator, emulate
from qatlib.errors import ProgramError
from qatlib.factors import factors, fused_factors
from qatlib.ops.base import BY_KIND, Operator
from qatlib.ops.elementwise import sum_factors
from qatlib.qtype import INT32, QType
from tests.case_builder import Array, Builder, Case, codes
from tests.oracle import FactorError, addend_factor, factor, half_away, run, single_precision, sum_factor
from tests.oracle.integers import Rounding
from tests.strategies import KINDS, ROUNDING_KINDS, cases, chains
from tests.strategies import case as one_case

Property = Callable[[Case], None]
KEEP_GOING = list(HealthCheck)
FAST = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=KEEP_GOING)
FEW = settings(FAST, max_examples=30)
SLOW = settings(max_examples=100, deadline=None, database=None, suppress_health_check=KEEP_GOING, print_blob=True)


def over(strategy: SearchStrategy[Case], profile: settings, check: Property) -> int:
    """Run ``check`` on every case that ``profile`` draws from ``strategy``; returns how many there were."""
    count = 0

    @profile
    @given(case=strategy)
    def generated(case: Case) -> None:
        nonlocal count
        count += 1
        check(case)

    generated()
    return count


def tensors(case: Case) -> list[Tensor]:
    return [torch.from_numpy(x) for x in case.inputs]


def differing(expected: dict[str, Array], traced: dict[str, Tensor]) -> dict[str, str]:
    """What is not equal, by name of the value: dtype, shape, or the number of elements and the first one."""
    faults = dict.fromkeys(expected.keys() ^ traced.keys(), "missing or unknown")
    for name in expected.keys() & traced.keys():
        want, got = expected[name], traced[name].numpy()
        if (want.dtype, want.shape) != (got.dtype, got.shape):
            faults[name] = f"{got.dtype}{got.shape}, expected {want.dtype}{want.shape}"
        elif not np.array_equal(want, got):
            at = tuple(np.argwhere(want != got)[0])
            faults[name] = f"{np.sum(want != got)} of {want.size} differ; at {at}: {got[at]}, expected {want[at]}"
    return faults


def equals_oracle(case: Case) -> None:
    expected = run(case.program, *case.inputs)
    outputs, trace = emulate(case.program, tensors(case), trace=True)
    assert differing(expected, trace) == {}
    names = case.program.outputs
    assert differing({name: expected[name] for name in names}, dict(zip(names, outputs, strict=True))) == {}


def layouts(x: Tensor) -> list[Tensor]:
    """The same numbers in other memory: spread out, transposed, channels_last."""
    spread = torch.empty((*x.shape, 2), dtype=x.dtype)
    spread[..., 0] = x
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    images = [x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else []
    return [spread[..., 0], turned, *images]


def ignores_memory_layout(case: Case) -> None:
    expected = run(case.program, *case.inputs)
    emulator = Emulator(case.program)
    for variant in range(3):
        inputs = [layouts(x)[min(variant, len(layouts(x)) - 1)] for x in tensors(case)]
        assert differing(expected, emulator.trace(*inputs)) == {}


def ignores_batch_and_threads(case: Case) -> None:
    """A batch of five is five batches of one, and two threads do what one does."""
    emulator = Emulator(case.program)
    whole = emulator.trace(*tensors(case))
    with_two_threads = on_threads(2, emulator, tensors(case))
    assert differing({name: value.numpy() for name, value in whole.items()}, with_two_threads) == {}
    for i in range(5):
        single = emulator.trace(*(x[i : i + 1] for x in tensors(case)))
        follows = {name for name, value in case.program.values.items() if any(size < 0 for size in value.shape)}
        parts = {name: (value[i : i + 1] if name in follows else value).numpy() for name, value in whole.items()}
        assert differing(parts, single) == {}


def on_threads(count: int, emulator: Emulator, inputs: list[Tensor]) -> dict[str, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return emulator.trace(*inputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_one_op_equals_the_oracle(kind: str) -> None:
    over(cases(kind), FAST if kind in ROUNDING_KINDS else FEW, equals_oracle)


def test_a_chain_equals_the_oracle() -> None:
    over(chains(), FEW, equals_oracle)


def test_memory_layout_changes_nothing() -> None:
    over(chains(), FEW, ignores_memory_layout)


def test_batch_size_and_threads_change_nothing() -> None:
    over(chains(batches=(5,)), FEW, ignores_batch_and_threads)


@pytest.mark.parametrize("kind", ROUNDING_KINDS)
def test_work_in_many_small_pieces_equals_the_oracle(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the emulator does in one piece with tensors as small as these, it does in several with large ones."""
    monkeypatch.setattr(integer, "_CHUNK", 40)
    over(cases(kind), FEW, equals_oracle)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_op_equals_the_oracle_on_many_cases(kind: str) -> None:
    assert over(cases(kind), SLOW, equals_oracle) == SLOW.max_examples


def test_the_slow_suite_has_two_thousand_cases_of_all_kinds_and_formats() -> None:
    """Every kind that a Program can hold occurs, with int8 and int16, and with both at once where it takes them."""
    assert SLOW.max_examples * len(KINDS) >= 2000
    formats = formats_of_kinds(24)
    assert formats.keys() == program_kinds()
    for kind, seen in formats.items():
        assert {"int8"} <= seen.each if kind == "logical" else {"int8", "int16"} <= seen.each, kind
    assert {kind for kind, seen in formats.items() if seen.mixed} >= MIXED


MIXED = {
    *("conv", "conv_transpose", "linear", "cat", "avg_pool", "adaptive_avg_pool", "add", "mul", "maximum", "minimum"),
    *("compare", "where", "sum", "matmul", "table", "prelu", "grid_sample"),
}
"""Kinds that read or write int8 and int16 at once."""
BY_ANOTHER_NAME = {"sub", "div", "floor_divide", "masked_fill"}
"""Operators whose Program op is that of another, or that are refused."""


def program_kinds() -> set[str]:
    """The kinds with an integer kernel; a float island has none of its own."""
    kinds = {kind for kind, operator in BY_KIND.items() if type(operator).kernel is not Operator.kernel}
    return kinds - BY_ANOTHER_NAME - {"float_op"}


@dataclass
class Formats:
    """Dtypes that one kind of op met, and whether one op met two widths of activations at once."""

    each: set[str] = field(default_factory=set)
    mixed: bool = False


def formats_of_kinds(count: int) -> dict[str, Formats]:
    """What ``count`` generated cases of every maker hold."""
    formats: defaultdict[str, Formats] = defaultdict(Formats)
    for kind in KINDS:
        for seed in range(count):
            program = one_case(kind, seed).program
            for op in program:
                values = (*program.in_values(op), program.values[op.output])
                formats[op.kind].each |= {value.qtype.dtype for value in values}
                dtypes = {value.qtype.dtype for value in values if not value.qtype.truth}
                formats[op.kind].mixed |= {"int8", "int16"} <= dtypes
    return formats


@pytest.mark.slow
def test_a_chain_is_exact_in_every_layout_batch_and_thread_count_on_many_cases() -> None:
    over(chains(), SLOW, equals_oracle)
    over(chains(), SLOW, ignores_memory_layout)
    over(chains(batches=(5,)), SLOW, ignores_batch_and_threads)


def dilated_conv_on_channels_last() -> None:
    """A case on which oneDNN 3.12 ends the process: channels_last, dilation and padding (seen with AVX2)."""
    b = Builder(3, np.random.default_rng(0))
    x = b.feed((6, 3, 1), QType("int8", 0.5), "uniform")
    weight = torch.from_numpy(codes(b.rng, "uniform", (2, 6, 1, 1), -128, 127).astype(np.int8))
    attrs = {"stride": [2, 2], "padding": [[0, 0], [1, 1]], "dilation": [3, 3], "groups": 1, "acc_bound": 6 * 2**14}
    y = b.emit("conv", [x], (-1, 2, 2, 2), INT32, attrs, weight=weight, bias=torch.zeros(2, dtype=torch.int32))
    case = b.finish(y)
    for _ in range(20):
        ignores_memory_layout(case)


@pytest.mark.slow
def test_a_dilated_convolution_survives_channels_last() -> None:
    child = multiprocessing.get_context("spawn").Process(target=dilated_conv_on_channels_last)
    child.start()
    child.join()
    assert child.exitcode == 0


# -- multipliers and shifts ---------------------------------------------------------------------------------------

ratios = st.floats(2.0**-64, 2.0**24) | st.builds(lambda e, n: n * 2.0**e, st.integers(-70, 20), st.integers(1, 2**23))
"""Factors in and around the range that has a shift, and some whose multiplier is a tie."""
signed = st.builds(lambda r, sign: sign * r, ratios, st.sampled_from([1, 1, -1]))


@settings(FAST, max_examples=300)
@given(r=ratios, bits=st.integers(8, 21))
def test_one_factor_equals_the_oracle(r: float, bits: int) -> None:
    try:
        m, n = factor(r, bits)
    except FactorError:
        with pytest.raises(ProgramError, match="QAT171"):
            factors([r], bits, "op")
    else:
        assert factors([r], bits, "op") == ([m], n)


@settings(FAST, max_examples=300)
@given(r1=ratios, r2=ratios, bits=st.integers(8, 21))
def test_addend_factors_equal_the_oracle(r1: float, r2: float, bits: int) -> None:
    try:
        expected = addend_factor(r1, r2, bits)
    except FactorError:
        with pytest.raises(ProgramError, match="QAT171"):
            fused_factors(r1, r2, bits, "op")
    else:
        assert fused_factors(r1, r2, bits, "op") == expected


@settings(FAST, max_examples=300)
@given(r1=signed, r2=signed, bits=st.integers(8, 21), wide=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_factors_of_a_sum_equal_the_oracle(r1: float, r2: float, bits: int, wide: tuple[bool, bool, bool]) -> None:
    x1, x2, y = (2**15 if w else 2**7 for w in wide)
    try:
        expected = sum_factor(r1, r2, bits, (x1, x2), -y)
    except FactorError:
        with pytest.raises(ProgramError, match="QAT171"):
            sum_factors((r1, r2), (x1, x2), y, bits, "op")
    else:
        assert sum_factors((r1, r2), (x1, x2), y, bits, "op") == expected


# -- the sample has teeth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUNDING_KINDS)
def test_the_sample_would_catch_halves_rounded_away_from_zero(kind: str) -> None:
    assert cases_that_tell_from(half_away, kind) >= 1


@pytest.mark.parametrize("kind", ["conv", "linear", "dense_sum"])
def test_the_sample_would_catch_a_product_rounded_to_float32(kind: str) -> None:
    assert cases_that_tell_from(single_precision, kind) >= 1


def cases_that_tell_from(rounding: Rounding, kind: str) -> int:
    """Number of cases of the default sample whose result changes with the wrong rule ``rounding``."""
    caught: list[bool] = []

    def compare(case: Case) -> None:
        wrong = run(case.program, *case.inputs, rounding=rounding)
        traced = {name: torch.from_numpy(value) for name, value in wrong.items()}
        caught.append(bool(differing(run(case.program, *case.inputs), traced)))

    over(cases(kind), FAST, compare)
    return sum(caught)


def test_one_wrong_element_is_a_difference() -> None:
    def planted(case: Case) -> None:
        expected = run(case.program, *case.inputs)
        wrong = {name: torch.from_numpy(value.copy()) for name, value in expected.items()}
        output = case.program.outputs[0]
        wrong[output].view(-1)[-1] += 1
        assert list(differing(expected, wrong)) == [output]

    over(cases("conv"), FAST, planted)


def test_the_sample_takes_every_route_and_saturates() -> None:
    seen: Counter[str] = Counter()

    def look(case: Case) -> None:
        seen.update(Emulator(case.program).routes.values())
        results = run(case.program, *case.inputs).values()
        at_limit = [np.isin(x, (-(2**31), 2**31 - 1)).any() for x in results if x.dtype == np.int32]
        seen["saturated"] += int(np.sum(at_limit))

    for kind in ("conv", "linear"):
        over(cases(kind), FAST, look)
    routes = ("float32", "float32-split", "float32-bytes", "float64")
    assert all(seen[name] > 0 for name in (*routes, "saturated")), seen
