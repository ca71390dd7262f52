"""docs/examples.md shows what the reports in git say."""

from __future__ import annotations

import csv

import pytest

from bench.reference import MODELS, ROWS, read_models
from bench.rows import METHODS, markdown, read_rows
from tests.examples import committed

EXAMPLES = ("efficientnet_lite0", "sentence_encoder", "warp", "detector", "recurrent", "hard_case")
LINES = (committed.ROOT / "docs" / "examples.md").read_text().splitlines()
NOTABLE = 1e-3
"""Share of the elements from which an op is listed."""


def table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(committed.text(f"examples/{name}/reports/lsb.csv").splitlines()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_codes_that_differ(name: str) -> None:
    rows = table(name)
    differing, elements = (sum(int(row[key]) for row in rows) for key in ("differing", "elements"))
    assert f"| {name} | {differing:,} of {elements:,} |" in LINES
    assert max(float(row["largest_lsb"]) for row in rows) <= 1


def test_the_ops_on_which_more_than_a_thousandth_differs() -> None:
    expected = []
    for name in EXAMPLES:
        groups: dict[str, list[float]] = {}
        for row in table(name):
            if float(row["share"]) > NOTABLE:
                groups.setdefault(f"{row['dtype']} `{row['kind']}`", []).append(float(row["share"]))
        expected += [f"| {name} | {ops} | {len(x)} | {100 * max(x):.2g} % |" for ops, x in groups.items()]
    start = LINES.index("| example | ops | number | largest share | why |") + 2
    shown = [line for line in LINES[start:] if line.startswith("| ")]
    assert [f"{line.rsplit(' | ', 1)[0]} |" for line in shown] == expected


@pytest.mark.parametrize(
    ("name", "title", "metric", "form"),
    [
        ("efficientnet_lite0", "class of the float network", "agreement", "{:.4f}"),
        ("efficientnet_lite0", "SQNR of the logits", "logit_sqnr_db", "{:.1f} dB"),
        ("sentence_encoder", "cosine with the float vector", "cosine", "{:.4f}"),
        ("sentence_encoder", "answer that the float encoder finds", "retrieval_agreement", "{:.4f}"),
    ],
)
def test_the_further_metrics(name: str, title: str, metric: str, form: str) -> None:
    scores = committed.scores(name)
    cells = [form.format(scores[x][metric]) for x in ("fake_quant", "integer", "integer_against_fake_quant")]
    assert f"| {name}: {title} | {' | '.join(cells)} |" in LINES


def test_the_hard_case_before_any_cure() -> None:
    scores = committed.scores("hard_case")
    for title, form in (("float", "float"), ("int8, calibrated", "integer")):
        assert f"| {title} | {scores[form]['accuracy']:.4f} |" in LINES


def test_every_method_and_qat() -> None:
    tables = markdown(read_rows(ROWS), read_models(MODELS))
    assert tables in "\n".join(LINES), "python -m bench.reference --table prints what belongs there"


def test_the_bundled_example_keeps_its_accuracy() -> None:
    rows = [row for row in read_rows(ROWS) if row.example == "fashion_mnist"]
    (in_float,) = [row.in_float for row in rows if row.in_float is not None]
    calibrated = {row.method: row.integer or 0 for row in rows if row.form == "ptq"}
    trained = {row.seed: row.integer or 0 for row in rows if row.form == "qat"}
    assert {row.items for row in rows} == {10_000}
    assert set(calibrated) == set(METHODS)
    assert set(trained) == {0, 1, 2}
    assert max(calibrated.values()) >= in_float - 0.01
    assert sum(trained.values()) / len(trained) >= in_float - 0.002
