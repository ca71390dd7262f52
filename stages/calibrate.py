"""Show calibration data to the observers and set every activation scale."""

from __future__ import annotations

import click

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage


@stage("calibrate")
def main(config: Config) -> None:
    """Calibrate, and score the fake-quant model in VALIDATION state."""
    from qatlib.fake.calibrate import calibrate
    from qatlib.fake.coverage import mac_coverage
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project

    project, section = Project(config), config.calibrate
    model = project.fake_quant_model()
    coverage = mac_coverage(model)
    click.echo(str(coverage))
    items = section.batches * section.batch_size
    samples = calibrate(model, project.batches("calib", items, section.batch_size), project.device)
    scored = project.evaluate(model, "test")
    project.save_fake_quant(model, "artifacts/calibrated.safetensors")
    write_metrics(
        "reports/calibrate/metrics.json",
        "calib",
        {
            project.metric().name: scored.value,
            "images": scored.images,
            "calibration_images": samples,
            "macs": coverage.total,
            "quantized_macs_share": coverage.share,
        },
    )


if __name__ == "__main__":
    main()
