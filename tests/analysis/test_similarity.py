"""The similarity table: columns, order, and the selectable measures."""

from __future__ import annotations

import csv
import io

import pytest

from qatlib.analysis.profiler import capture_pair, featuremap_similarity
from qatlib.analysis.similarity import COLUMNS, MEASURES, similarity_table, worst
from qatlib.errors import ConfigError
from tests.analysis.analysis_nets import Trio


def test_columns_and_forward_order(trio: Trio) -> None:
    table = featuremap_similarity(trio.float_model, trio.fake, trio.batches[0])
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert [name.replace(" (Cosine)", "") for name in rows[0]] == list(COLUMNS)
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(8)]
    assert rows[-1][1] == "fc"
    assert rows[-1][4] == rows[-1][6] == rows[-1][7] == "", "a float output has no scale and no LSB"
    assert float(rows[-1][5]) > 0


def test_by_op_error_is_descending_with_unmeasured_rows_last(trio: Trio) -> None:
    table = featuremap_similarity(trio.float_model, trio.fake, trio.batches[0]).by_op_error()
    errors = [row.op_error_lsb for row in table.rows]
    assert errors[-1] is None
    measured = [error for error in errors if error is not None]
    assert measured == sorted(measured, reverse=True)
    assert len(table.rows) == 8


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_every_measure_can_be_selected(trio: Trio, measure: str) -> None:
    seen = capture_pair(trio.float_model, trio.fake, trio.batches[0], "FvsQ")
    first = similarity_table(seen, measure).rows[0].similarity
    accumulated = seen.records[0].accumulated
    assert accumulated is not None
    assert first == MEASURES[measure](accumulated)


def test_a_callable_is_a_measure(trio: Trio) -> None:
    table = featuremap_similarity(trio.float_model, trio.fake, list(trio.batches), lambda a, b: float(a.shape[0]))
    assert {row.similarity for row in table.rows} == {4.0}
    assert "Similarity (custom)" in table.csv()


def test_unknown_measure_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"QAT107 .*'cosin'.*Cosine, MSE, L1, KL, SQNR"):
        featuremap_similarity(None, None, (), "cosin")


def test_worst_is_lowest_sqnr_first(trio: Trio) -> None:
    seen = capture_pair(trio.float_model, trio.fake, trio.batches[0], "FvsQ")
    values = [record.same_input.sqnr_db for record in worst(seen.records, 4) if record.same_input]
    assert len(values) == 4
    assert values == sorted(values)
