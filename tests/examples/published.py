"""What the scores of an example with published weights are held to: ``reports/scores.json`` and docs/examples.md."""

from __future__ import annotations

import json

import pytest

from examples import scores
from tests.examples import integer


def committed(name: str) -> scores.Scores:
    """The scores in git."""
    found: scores.Scores = json.loads((integer.ROOT / "examples" / name / "reports" / "scores.json").read_text())
    return found


def assert_the_docs_show_them(name: str, metric: str, agreement: str) -> None:
    """The row of docs/examples.md has float, fake-quant, integer and the agreement of the last two, rounded."""
    found = committed(name)
    cells = [f"{found[form][metric]:.4f}" for form in ("float", "fake_quant", "integer")]
    cells.append(f"{100 * found['integer_against_fake_quant'][agreement]:.2f} %")
    assert integer.shown(name)[4:8] == cells


def assert_they_are_the_committed(it: integer.Made, one: float) -> None:
    """Scored again, the three forms come to the committed values; ``one`` is what a single input counts."""
    again = scores.measure(it.project, it.model, it.program)
    assert again.keys() == committed(it.folder.name).keys()
    for form, values in committed(it.folder.name).items():
        assert again[form] == pytest.approx(values, abs=one, rel=0.01)
