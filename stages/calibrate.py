"""Show calibration data to the observers and set every activation scale."""

from __future__ import annotations

import click

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage


@stage("calibrate", parallel=True)
def main(config: Config) -> None:
    """Calibrate, and score the fake-quant model in VALIDATION state."""
    from rich.console import Console

    from qatlib.fake.calibrate import calibrate
    from qatlib.fake.coverage import mac_coverage
    from qatlib.fake.distributed import rank
    from qatlib.fake.formats import check_qconfig
    from qatlib.fake.ranges import write_ranges
    from qatlib.pipeline import calibration
    from qatlib.pipeline.after_training import help_after_training
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project

    project, section = Project(config), config.calibrate
    model = project.fake_quant_model(equalized=section.equalize)
    coverage = mac_coverage(model)
    click.echo(str(coverage))
    data = project.calibration_batches()
    samples = calibrate(model, data, project.device, histograms=bool(section.compare))
    if rank() > 0:
        return
    ranges, held_out = calibration.measured_ranges(project, model)
    for note in calibration.range_notes(ranges, section.method):
        click.echo(note)
    compared, metric = calibration.compare_methods(project, model), project.metric().name
    if compared:
        Console().print(calibration.comparison_table(compared, metric))
    helped = help_after_training(project, model)
    scored = project.evaluate(model, "test")
    project.save_fake_quant(model, "artifacts/calibrated.safetensors", helped.done)
    check_qconfig(model, "reports/calibrate/qconfig.csv")
    write_ranges("reports/calibrate/ranges.csv", ranges)
    calibration.write_comparison("reports/calibrate/compare.csv", compared, metric)
    write_metrics(
        "reports/calibrate/metrics.json",
        "calib",
        {
            metric: scored.value,
            "images": scored.images,
            "calibration_images": samples,
            **calibration.range_metrics(ranges, held_out),
            "macs": coverage.total,
            "quantized_macs_share": coverage.share,
            **helped.metrics,
        },
    )


if __name__ == "__main__":
    main()
