"""Show calibration data to the observers and set every activation scale."""

from __future__ import annotations

import click

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage


@stage("calibrate")
def main(config: Config) -> None:
    """Calibrate, and score the fake-quant model in VALIDATION state."""
    from qatlib.fake.coverage import mac_coverage
    from qatlib.pipeline.after_training import calibrated_model
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project

    project = Project(config)
    made = calibrated_model(project)
    coverage = mac_coverage(made.model)
    click.echo(str(coverage))
    scored = project.evaluate(made.model, "test")
    project.save_fake_quant(made.model, "artifacts/calibrated.safetensors", made.done)
    write_metrics(
        "reports/calibrate/metrics.json",
        "calib",
        {
            project.metric().name: scored.value,
            "images": scored.images,
            "calibration_images": made.samples,
            "macs": coverage.total,
            "quantized_macs_share": coverage.share,
            **made.metrics,
        },
    )


if __name__ == "__main__":
    main()
