"""Turn the fake-quant model into an integer Program and score its integers."""

from __future__ import annotations

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage


@stage("convert")
def main(config: Config) -> None:
    """Convert, and score the Program on the whole test split."""
    from qatlib.conversion import IntegerModel
    from qatlib.golden.vectors import write_golden
    from qatlib.pipeline.conversion import program_of
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project

    project = Project(config)
    program = program_of(project, project.load_fake_quant("artifacts/qat.safetensors"))
    scored = project.evaluate(IntegerModel(program, project.device), "test")
    program.save("artifacts/program")
    if items := config.convert.golden.items:
        inputs, _ = next(iter(project.batches("test", items, items)))
        write_golden(program, inputs, "artifacts/program/golden")
    write_metrics(
        "reports/convert/metrics.json",
        "integer",
        {
            project.metric().name: scored.value,
            "images": scored.images,
            "ops": len(program.ops),
            "float_islands": len(program.islands()),
        },
    )


if __name__ == "__main__":
    main()
