"""Is this float model worth quantizing: weights, outputs, accuracy, train/validation gap, inputs."""

from __future__ import annotations

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage

REPORTS = "reports/float_check"


@stage("float_check")
def main(config: Config) -> None:
    """Load the float model strictly and score it."""
    from dataclasses import asdict

    from qatlib.atomic import write_json
    from qatlib.pipeline.data import fingerprint
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project

    project = Project(config)
    name = project.metric().name
    gap_images = config.float_check.gap_images
    model = project.float_model
    test = project.evaluate(model, "test")
    train = project.evaluate(model, "train", gap_images)
    val = project.evaluate(model, "val", gap_images)
    nodes = len(project.graph.nodes)
    seen = fingerprint(project.split("calib"), len(project.split("calib")), "calib")  # type: ignore[arg-type]
    write_json(
        f"{REPORTS}/inputs.json",
        asdict(seen),
    )
    write_metrics(
        f"{REPORTS}/metrics.json",
        "float",
        {
            name: test.value,
            "images": test.images,
            f"train_{name}": train.value,
            "train_images": train.images,
            f"val_{name}": val.value,
            "val_images": val.images,
            "train_val_gap": abs(train.value - val.value),
            "graph_nodes": nodes,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
    )


if __name__ == "__main__":
    main()
