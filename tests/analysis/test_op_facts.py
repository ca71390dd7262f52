"""What is read from a Program, against the model that it came from; faults planted in a real model are found in it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from qatlib.analysis.facts import Facts
from qatlib.analysis.op_facts import OpFact, program_facts
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.rules import run_rules
from qatlib.conversion import convert_fx
from tests.analysis.analysis_nets import Net, Trio, quantized


def by_name(facts: tuple[OpFact, ...]) -> dict[str, OpFact]:
    return {fact.name: fact for fact in facts}


def test_weight_scales_are_those_of_the_model(trio: Trio) -> None:
    facts = by_name(program_facts(trio.integer.program))
    for name in ("side", "fc"):
        weight = trio.float_model.get_submodule(name).weight.detach().double()  # type: ignore[union-attr, operator]
        wanted = weight.reshape(weight.shape[0], -1).abs().amax(1) / 127.5
        seen = facts[name].weight
        assert seen is not None
        assert seen.scales == pytest.approx(wanted.tolist(), rel=1e-4), name
        assert seen.dead == ()


def test_outputs_and_formats(trio: Trio) -> None:
    facts = by_name(program_facts(trio.integer.program))
    assert [name for name, fact in facts.items() if fact.is_output] == ["fc"]
    assert facts["fc"].dtype == "int32"
    assert facts["cat"].input_scales == (trio.fake.qtype("block").scale, trio.fake.qtype("side").scale)
    assert all(facts[name].acc_bound for name in ("stem", "block", "side", "fc"))
    assert facts["cat"].acc_bound is None


def _kill_channel(model: Net) -> None:
    model.side.weight.data[2] = 0


def _outlier_channel(model: Net) -> None:
    model.side.weight.data[1] *= 1000


def _narrow_branch(model: Net) -> None:
    model.side.weight.data *= 1e-3
    model.side.bias.data *= 1e-3


@pytest.mark.parametrize(
    ("plant", "code", "module"),
    [(_kill_channel, "QAT010", "side"), (_outlier_channel, "QAT011", "side"), (_narrow_branch, "QAT009", "cat")],
)
def test_a_fault_planted_in_a_model_is_found(trio: Trio, plant: Callable[[Net], None], code: str, module: str) -> None:
    def codes(model: Net) -> set[tuple[str, str]]:
        fake = quantized(model, trio.batches)
        seen = capture_pair(model, fake, list(trio.batches), "FvsQ")
        return {(f.code, f.module) for f in run_rules(Facts(fvsq=seen, ops=program_facts(convert_fx(fake).program)))}

    faulty = copy.deepcopy(trio.float_model)
    with torch.no_grad():
        plant(faulty)
    assert (code, module) in codes(faulty)
    assert (code, module) not in codes(trio.float_model)
