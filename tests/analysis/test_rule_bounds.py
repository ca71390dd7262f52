"""What the planted faults cannot say of the rules: where their bounds lie, what they name, and which edit they give."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qatlib.analysis.facts import Facts, InputFact, input_facts
from qatlib.analysis.findings import Finding, severity_counts
from qatlib.analysis.op_facts import WeightFact
from qatlib.analysis.records import Capture
from qatlib.analysis.rules import rule, run_rules
from qatlib.fake.coverage import Coverage
from qatlib.pipeline.calibration import Compared
from qatlib.qtype import BOOL, QType
from tests.analysis.planted import (
    CLEAN,
    COARSE,
    COARSER,
    CUT,
    OUTLIER,
    OVER,
    STEEP,
    UNLIKE,
    comparison,
    extra,
    input_of,
    op,
    record,
    records,
    scored,
    span,
)


def only(facts: Facts, code: str) -> list[Finding]:
    return [finding for finding in run_rules(facts) if finding.code == code]


def test_ratio_is_inverted_when_lower_is_better() -> None:
    metrics = {"float": {"error": 0.1}, "calib": {"error": 0.2}}
    facts = Facts(metrics=metrics, metric="error", higher_is_better=False)
    assert facts.ratio("calib") == 0.5
    assert [f.code for f in run_rules(facts)] == ["QAT001"]


def test_the_exact_threshold_of_calibration_belongs_to_tuning() -> None:
    facts = Facts(metrics={"float": {"accuracy": 1.0}, "calib": {"accuracy": 0.8}})
    assert [(f.code, f.severity) for f in run_rules(facts)] == [("QAT002", "warning")]


def test_the_goal_of_params_decides_what_calibration_owes() -> None:
    easy = replace(CLEAN, goals=(), **scored(calib=0.925))
    assert not only(easy, "QAT002")
    assert only(replace(easy, **scored(calib=0.92)), "QAT002")


def test_equal_scores_on_few_images_or_in_a_known_state_are_no_fault() -> None:
    same = scored(calib=0.93)
    assert not only(replace(CLEAN, **same), "QAT003")
    same["metrics"]["calib"]["images"] = 100
    assert not only(replace(CLEAN, state=None, **same), "QAT003")


def test_only_the_first_coarse_op_of_a_chain_is_blamed() -> None:
    chain = records(conv1={"same_input": COARSE}, conv2={"same_input": COARSER}, join={"same_input": COARSER})
    assert [f.module for f in only(replace(CLEAN, fvsq=chain), "QAT008")] == ["conv1"]


def test_int16_op_and_scale_keeping_op_are_not_asked_for_int16() -> None:
    wide = records(conv2={"same_input": COARSE, "qtype": QType("int16", 1e-4)})
    assert not only(replace(CLEAN, fvsq=wide), "QAT008")
    kept = record(1, "pool", "max_pool", ("conv",), same_input=COARSE)
    seen = Capture("FvsQ", 1, 1, (record(0, "conv", "conv", ("x",)), kept))
    assert not only(replace(CLEAN, fvsq=seen), "QAT008")


def test_a_coarse_input_is_cured_in_the_input_table() -> None:
    (finding,) = only(replace(CLEAN, fvsq=records(x_quant={"same_input": COARSE})), "QAT008")
    assert finding.edit == "qconfig:\n  inputs:\n    - match: x\n      activation: int16"


def test_a_float_island_owes_no_contract() -> None:
    broken = records("QvsQ", conv2={"same_input": comparison(0.1)})
    assert only(replace(CLEAN, qvsq=broken), "QAT015")
    assert not only(replace(CLEAN, qvsq=broken, ops=(op("conv2", "float_op"),)), "QAT015")


@pytest.mark.parametrize(
    ("before", "after", "images", "found"),
    [
        (1.0, 0.9875, 80, False),  # one of 80 images
        (1.0, 0.9625, 80, False),  # three
        (1.0, 0.95, 80, True),  # four
        (0.9, 0.892, 10_000, False),  # 0.9 %
        (0.9, 0.89, 10_000, True),  # 1.1 %
        (0.9, 0.88, 100, False),  # two images
        (30.0, 29.0, 80, False),  # decibels: 3 of 80 items are 1.1
        (30.0, 28.5, 80, True),
        (0.9, 0.89, None, True),
    ],
)
def test_a_loss_that_few_images_cannot_resolve_is_no_loss(
    before: float, after: float, images: int | None, found: bool
) -> None:
    metrics = {"qat": {"accuracy": before}, "integer": {"accuracy": after}}
    if images is not None:
        metrics["integer"]["images"] = images
    findings = only(Facts(metrics=metrics), "QAT004")
    assert bool(findings) is found
    swapped = {"qat": {"accuracy": after}, "integer": {**metrics["integer"], "accuracy": before}}
    assert not only(Facts(metrics=swapped), "QAT004")
    assert bool(only(Facts(metrics=swapped, higher_is_better=False), "QAT004")) is found


def test_one_code_on_a_few_elements_keeps_the_contract() -> None:
    base = comparison(0.0)
    for differing, count, broken in ((20, 20_000, False), (60, 20_000, True), (1, 100, False), (4, 100, True)):
        seen = replace(base, differing=differing, above_1_lsb=0, count=count)
        findings = only(replace(CLEAN, qvsq=records("QvsQ", conv2={"same_input": seen})), "QAT015")
        assert bool(findings) is broken, (differing, count)


def test_wide_codes_and_coarse_tables_have_bounds_of_their_own() -> None:
    base = comparison(0.0)
    for differing, broken in ((400, False), (800, True)):  # of 20,000: 2 % and 4 %
        seen = replace(base, differing=differing, above_1_lsb=0)
        facts = replace(CLEAN, qvsq=records("QvsQ", conv2={"same_input": seen, "qtype": QType("int16", 1 / 64)}))
        assert [f.severity for f in only(facts, "QAT015")] == ["info"] * broken, differing
    for codes, broken in ((10, False), (11, True)):  # the table is off by 9.5, the code by half
        seen = replace(base, differing=9000, above_1_lsb=9000, max_abs=codes / 64)
        facts = replace(
            CLEAN,
            qvsq=records("QvsQ", conv2={"same_input": seen}),
            ops=(op("conv2", "table", weight=None, table=STEEP),),
        )
        assert bool(only(facts, "QAT015")) is broken, codes


def test_ties_of_samplers_are_inherent() -> None:
    for differing, broken in ((2400, False), (2800, True)):  # of 20,000: 12 % and 14 %
        seen = replace(comparison(0.0), differing=differing, above_1_lsb=0)
        qvsq = records("QvsQ", conv2={"same_input": seen})
        for kind in ("resize_linear", "grid_sample"):
            facts = replace(CLEAN, qvsq=qvsq, ops=(op("conv2", kind, weight=None),))
            assert bool(only(facts, "QAT015")) is broken, (kind, differing)
        assert only(replace(CLEAN, qvsq=qvsq, ops=(op("conv2"),)), "QAT015")
    far = replace(comparison(0.0), differing=1, above_1_lsb=1)
    facts = replace(
        CLEAN, qvsq=records("QvsQ", conv2={"same_input": far}), ops=(op("conv2", "grid_sample", weight=None),)
    )
    assert only(facts, "QAT015")


def test_channels_that_cannot_be_equalized_get_more_bits_and_explain_what_reads_them() -> None:
    coarse = {"same_input": COARSE}
    seen = records(conv2={"channel_amax": UNLIKE, **coarse}, join=coarse, fc={**coarse, "qtype": QType("int8", 1 / 64)})
    fc = seen.find("fc")
    assert fc is not None
    reader = replace(fc, channel_amax=(1.0,) * 4)
    facts = replace(CLEAN, fvsq=replace(seen, records=(*seen.records[:-1], reader)))
    (finding,) = [f for f in run_rules(facts) if f.severity != "info"]
    assert (finding.code, finding.module) == ("QAT039", "conv2")
    assert finding.edit == "qconfig:\n  overrides:\n    - match: conv2\n      activation: int16"
    assert finding.evidence["channels_below_8_codes"] == 6
    lost = only(replace(facts, **scored(calib=0.5)), "QAT039")
    assert [f.severity for f in lost] == ["error"]


def test_three_channels_or_half_of_them_with_codes_are_no_fault() -> None:
    for amax in ((0.1, 0.1, 2.0), (0.1, 0.1, 1.0, 2.0), (0.0,) * 6):
        assert not only(replace(CLEAN, fvsq=records(conv2={"channel_amax": amax})), "QAT039"), amax


def test_a_scale_too_large_for_every_channel_is_another_fault() -> None:
    assert not only(replace(CLEAN, fvsq=records(conv2={"channel_amax": (0.1,) * 8})), "QAT039")


def test_what_lowers_a_score_comes_before_the_score() -> None:
    facts = replace(CLEAN, fvsq=records(conv2={"channel_amax": UNLIKE}), **scored(calib=0.5))
    assert [f.code for f in run_rules(facts)][:2] == ["QAT039", "QAT001"]


def test_an_outlier_channel_is_cured_where_its_codes_are_lost() -> None:
    facts = replace(CLEAN, ops=(op("conv2", weight=OUTLIER),), overrides=({"match": "head", "scale": 0.5},))
    (finding,) = only(facts, "QAT011")
    assert finding.command == (
        'dvc exp run --temp -S "qconfig.overrides=[{match: conv2, activation: int16}, {match: head, scale: 0.5}]"'
    )
    for dtype in ("int16", "int32"):
        assert not only(replace(CLEAN, ops=(op("conv2", dtype=dtype, weight=OUTLIER),)), "QAT011"), dtype


def test_the_command_keeps_the_overrides_that_stand() -> None:
    facts = replace(CLEAN, fvsq=records(conv2={"same_input": COARSE}), overrides=({"match": "head.*", "scale": 0.5},))
    (finding,) = only(facts, "QAT008")
    assert finding.edit == "qconfig:\n  overrides:\n    - match: conv2\n      activation: int16"
    assert finding.command == (
        "dvc exp run --temp -S \"qconfig.overrides=[{match: conv2, activation: int16}, {match: 'head.*', scale: 0.5}]\""
    )


def test_all_inputs_are_looked_at_with_their_scale_advice() -> None:
    facts = replace(CLEAN, inputs=(InputFact("a", 0.0, 255.0, 127.0, "int8", 2.0), *CLEAN.inputs))
    (finding,) = only(facts, "QAT005")
    assert finding.module == "a"
    assert "scale: 1.99219" in finding.edit
    assert finding.evidence["max"] == 255.0


def test_input_facts_name_the_input_behind_the_quantizer() -> None:
    island = record(9, "conv2.quant", "quantize", ("conv2",))
    (seen,) = input_facts(replace(records(), records=(*records().records, island)))
    assert (seen.name, seen.min, seen.max, seen.dtype, seen.scale) == ("x", -1.0, 1.0, "int8", 1 / 64)


def test_float_ops_are_named_with_their_part_and_none_at_the_limit() -> None:
    facts = replace(CLEAN, coverage=Coverage(100, 80, {"a": 80, "b": 15, "c": 5}, ("b", "c")))
    (finding,) = only(facts, "QAT021")
    assert finding.evidence["float_ops"] == "b (15.0%), c (5.0%)"
    assert not only(replace(CLEAN, coverage=Coverage(100, 90, {"a": 90, "b": 10}, ("b",))), "QAT021")


def test_findings_are_ordered_and_counted_by_severity() -> None:
    findings = run_rules(replace(CLEAN, floor=0.95, **input_of(0.0, 255.0), **scored(calib=0.90)))
    assert [f.code for f in findings] == ["QAT012", "QAT005", "QAT002"]
    assert severity_counts(findings) == {"errors": 1, "warnings": 1, "info": 1}
    assert severity_counts(()) == {"errors": 0, "warnings": 0, "info": 0}


def test_a_code_cannot_be_claimed_twice() -> None:
    with pytest.raises(TypeError, match="QAT001 is claimed by"):
        rule("QAT001", guide="G5")(lambda facts: [])


def test_a_saturating_accumulator_names_what_the_data_did() -> None:
    facts = replace(
        CLEAN,
        ops=(op("conv2", acc_bound=OVER),),
        inputs=(InputFact("x", -1.0, 1.0, 0.0, "int16", 1 / 32768),),
        qvsq=replace(records("QvsQ"), saturations=(CUT,)),
    )
    (finding,) = only(facts, "QAT022")
    assert dict(finding.evidence) == {
        "acc_bound": OVER,
        "limit": OVER - 1,
        "largest_seen": OVER + 5,
        "saturated": 7,
        "elements": 1000,
    }
    assert finding.edit == "qconfig:\n  inputs:\n    - match: x\n      activation: int8"


def test_wide_weights_are_narrowed_first_and_a_format_kept_is_traced_to_its_maker() -> None:
    wide = WeightFact(8, (), (0.01,) * 8, "int16")
    (finding,) = only(replace(CLEAN, ops=(op("fc", "linear", acc_bound=OVER, weight=wide),)), "QAT014")
    assert finding.edit == "qconfig:\n  overrides:\n    - match: fc\n      weight: int8"
    chain = (
        op("conv1", dtype="int16"),
        op("flat", "reshape", dtype="int16", inputs=("conv1",), weight=None),
        op("fc", "linear", acc_bound=OVER, inputs=("flat",)),
    )
    (finding,) = only(replace(CLEAN, ops=chain), "QAT014")
    assert "match: conv1" in finding.edit


def test_an_accumulator_of_int8_alone_has_no_parameter_to_turn() -> None:
    ops = (op("conv1"), op("conv2", inputs=("conv1",), acc_bound=OVER))
    (finding,) = only(replace(CLEAN, ops=ops), "QAT014")
    assert "split the layer" in finding.edit


def test_a_steep_table_keeps_the_records_that_stand_and_ends_at_a_sensible_size() -> None:
    ops = (op("act", "table", weight=None, table=STEEP),)
    tables = ({"match": "other", "division": [-1.0, 2.5]},)
    (finding,) = only(replace(CLEAN, ops=ops, tables=tables), "QAT023")
    assert finding.command == (
        'dvc exp run --temp -S "convert.tables=[{match: act, division: curvature, segments: 64, entries: 2048}, '
        '{match: other, division: [-1.0, 2.5]}]"'
    )
    large = replace(STEEP, entries=20_000)
    (finding,) = only(replace(CLEAN, ops=(op("act", "table", weight=None, table=large),)), "QAT023")
    assert "clamp it in the model" in finding.edit
    gentle = replace(STEEP, worst_lsb=2.0)
    assert not only(replace(CLEAN, ops=(op("act", "table", weight=None, table=gentle),)), "QAT023")


def test_truth_values_and_positions_at_the_output_need_no_more_bits() -> None:
    for kind, dtype in (("compare", "int8"), ("argmax", "int32"), ("float_op", "int8"), ("linear", "int32")):
        ops = (op("end", kind, dtype=dtype, weight=None, is_output=True),)
        assert not only(replace(CLEAN, ops=ops), "QAT024"), kind


def test_the_format_of_a_reshaped_output_is_its_makers() -> None:
    ops = (op("add", weight=None, kind="add"), op("flat", "reshape", inputs=("add",), weight=None, is_output=True))
    (finding,) = only(replace(CLEAN, ops=ops), "QAT024")
    assert finding.module == "add"
    assert finding.evidence["output"] == "flat"


def test_a_constant_beside_an_activation_is_no_unequal_input() -> None:
    seen = (
        record(0, "a", "conv", ("x",)),
        record(1, "eps", "constant", (), spread=1e-5),
        record(2, "sum", "add", ("a", "eps")),
    )
    assert not only(replace(CLEAN, fvsq=Capture("FvsQ", 1, 1, seen)), "QAT009")


def test_constants_and_truth_values_may_be_zero_and_need_no_more_bits() -> None:
    flat = replace(comparison(0.0), dot=0.0, ref_sq=0.0, other_sq=0.0)
    bias = record(1, "bias", "constant", (), accumulated=flat)
    mask = record(2, "mask", "compare", ("a",), qtype=BOOL, accumulated=flat, same_input=COARSER)
    seen = Capture("FvsQ", 1, 1, (record(0, "a", "conv", ("x",)), bias, mask))
    assert not only(replace(CLEAN, fvsq=seen), "QAT019")
    assert not only(replace(CLEAN, fvsq=seen), "QAT008")


def test_the_cures_of_a_rewind_are_all_there_with_their_commands() -> None:
    (finding,) = only(replace(CLEAN, **extra(qat__nan_rewinds=2)), "QAT028")
    assert finding.evidence["learning_rate_factor"] == 0.25
    for word in ("float_check", "data or labels", "qat.lr=", "qat.warmup_steps=", "qat.clip_grad_norm="):
        assert word in finding.edit


def test_an_abnormal_first_loss_says_whether_calibration_or_the_scales_are_at_fault() -> None:
    (finding,) = only(replace(CLEAN, **extra(qat__first_loss=2.0, qat__first_loss_calibrated=1.9)), "QAT029")
    assert finding.edit == "calibrate:\n  method: mse"
    (finding,) = only(replace(CLEAN, **extra(qat__first_loss=2.0)), "QAT029")
    assert finding.edit == "qat:\n  averaging_constant: 0.0"


def test_without_epochs_there_is_no_advice_about_them() -> None:
    facts = replace(CLEAN, **extra(qat__epochs=0, qat__best_epoch=0, qat__last_epoch_gain=1.0))
    assert not only(facts, "QAT030")
    assert not only(facts, "QAT031")


def test_a_last_epoch_that_gains_a_little_is_what_a_schedule_does() -> None:
    assert not only(replace(CLEAN, **extra(qat__best_epoch=3, qat__last_epoch_gain=0.001)), "QAT030")


def test_the_activation_that_held_out_data_leaves_furthest_is_named_with_numbers() -> None:
    facts = replace(CLEAN, ranges=(*CLEAN.ranges, span("b", 1.2), span("c", 1.6), span("d", 1.09)))
    (finding,) = only(facts, "QAT033")
    assert finding.module == "c"
    assert finding.evidence == {
        "tensors_outside": 2,
        "tensors": 23,
        "calibrated_largest": 1.0,
        "held_out_largest": 1.6,
        "covered": 1 / 1.6,
    }


def test_a_hundred_samples_are_enough() -> None:
    assert run_rules(replace(CLEAN, **extra(calib__calibration_images=100))) == ()
    assert only(replace(CLEAN, **extra(calib__calibration_images=99)), "QAT032")


def test_another_method_is_predicted_where_both_were_scored() -> None:
    def row(method: str, value: float, percentile: float | None = None) -> Compared:
        return Compared(method, percentile, value, value / 0.93, 128, 0.1)

    used = ("percentile", 99.99)
    missed = replace(CLEAN, **scored(calib=0.90), calibration=used)
    scores = (row("percentile", 0.88, 99.99), row("percentile", 0.10, 99.0), row("mse", 0.91))
    (one,) = only(replace(missed, compared=scores), "QAT002")
    assert one.predicted == {"metric": pytest.approx(0.03)}
    for some in ((), scores[:2], scores[1:]):
        assert only(replace(missed, compared=some), "QAT002")[0].predicted == {}
    worse = (row("percentile", 0.88, 99.99), row("mse", 0.86))
    (one,) = only(replace(missed, **scored(calib=0.5), compared=worse), "QAT001")
    assert one.predicted == {"metric": pytest.approx(-0.02)}
