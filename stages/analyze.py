"""Compare float, fake-quant and Program op by op; write findings, summary and the page."""

from __future__ import annotations

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage


@stage("analyze")
def main(config: Config) -> None:
    """Run the analysis on validation images and publish everything in reports/."""
    import json
    from pathlib import Path

    import click

    from qatlib.analysis.call_sites import shared_calls
    from qatlib.analysis.facts import Facts, input_facts
    from qatlib.analysis.op_facts import program_facts
    from qatlib.analysis.outcome import publish
    from qatlib.analysis.parameters import parameters_of
    from qatlib.analysis.profiler import capture_pair
    from qatlib.analysis.statistics import statistics_of
    from qatlib.analysis.study import study_of
    from qatlib.analysis.summary import read_metrics
    from qatlib.analysis.unfused import unfused_operations
    from qatlib.fake.coverage import mac_coverage
    from qatlib.fake.formats import format_rows
    from qatlib.fake.model import FakeQuantModel
    from qatlib.fake.ranges import read_ranges
    from qatlib.pipeline.after_training import float_side
    from qatlib.pipeline.calibration import read_comparison
    from qatlib.pipeline.project import Project
    from qatlib.program import Program

    project, section = Project(config), config.analyze
    batches = project.batches("val", section.batches * section.batch_size, section.batch_size)
    checkpoint = "artifacts/calibrated.safetensors"
    calibrated = project.load_fake_quant(checkpoint)
    exact = float_side(project, checkpoint)
    fvsq = capture_pair(exact, calibrated, batches, "FvsQ")
    fake, program = project.load_fake_quant("artifacts/qat.safetensors"), Program.load("artifacts/program")
    qvsq = capture_pair(fake, program, batches, "QvsQ")
    parameters = {
        "FvsQ": parameters_of(calibrated, quantized=False, exact=exact if isinstance(exact, FakeQuantModel) else None),
        "QvsQ": parameters_of(fake, quantized=True),
    }
    metric, method = project.metric(), config.calibrate.method
    facts = Facts(
        metrics=read_metrics("reports"),
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        goals=config.goals,
        ignore=config.analyze.ignore,
        state=fake.state.name,
        floor=config.float_check.floor,
        max_train_val_gap=config.float_check.max_train_val_gap,
        overrides=tuple(record.model_dump(exclude_none=True) for record in config.qconfig.overrides),
        input_formats=tuple(record.model_dump(exclude_none=True) for record in config.qconfig.inputs),
        tables=tuple(record.model_dump(exclude_defaults=True) for record in config.convert.tables),
        inputs=input_facts(fvsq),
        fvsq=fvsq,
        qvsq=qvsq,
        ops=program_facts(program),
        coverage=mac_coverage(fake),
        ranges=read_ranges("reports/calibrate/ranges.csv"),
        unfused=unfused_operations(calibrated.graph),
        formats=tuple(format_rows(calibrated)),
        equalizable=() if config.calibrate.equalize else tuple(pair.producer for pair in project.equalized[1]),
        study=None if section.sensitivity is None else study_of(project, section.sensitivity),
        hybrid=config.qat.hybrid,
        preserve=config.convert.preserve,
        compared=read_comparison("reports/calibrate/compare.csv"),
        calibration=(method, config.calibrate.percentile if method == "percentile" else None),
        shared=shared_calls(fvsq, calibrated.graph),
        unshare=config.model.unshare,
        statistics=statistics_of((fvsq, qvsq), parameters),
    )
    outcome = publish(facts, performance=json.loads(Path("reports/compile_sim/performance.json").read_text()))
    for note in outcome.notes:
        click.echo(note)


if __name__ == "__main__":
    main()
