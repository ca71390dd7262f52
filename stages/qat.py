"""Fine-tune the calibrated model with fake-quant on; keep the epoch whose integers score best."""

from __future__ import annotations

from pathlib import Path

import qatlib
from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import discard_scratch, fingerprint, scratch_dir, stage

CALIBRATED = "artifacts/calibrated.safetensors"


@stage("qat")
def main(config: Config) -> None:
    """Train; a run that was cut off goes on where it stopped."""
    from functools import partial

    from qatlib.fake.train import Scores, Trainer, scorable
    from qatlib.pipeline.entry import load_entry
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project
    from qatlib.pipeline.reporting import step_bar, write_history

    project, section = Project(config), config.qat
    key = fingerprint(
        config=[config.model, config.data, config.metric, config.qconfig, config.qat, config.runtime],
        start=Path(CALIBRATED),
        code=[Path(config.model.code), Path(config.data.code), Path(qatlib.__file__).parent],
    )
    train = project.split("train")
    with step_bar("qat") as on_step:
        trainer = Trainer(
            model=project.load_fake_quant(CALIBRATED),
            params=section,
            loss=partial(load_entry(section.loss, "qat.loss"), **section.loss_kwargs),
            batches=lambda epoch, start: project.shuffled("train", section.batch_size, epoch, start),
            steps=-(-len(train) // section.batch_size),  # type: ignore[arg-type]
            score=lambda model: Scores(
                project.evaluate(model, "val", section.integer_eval_images).value,
                project.evaluate(scorable(model).to(project.device), "val", section.integer_eval_images).value,
            ),
            higher_is_better=project.metric().higher_is_better,
            device=project.device,
            scratch=scratch_dir(key),
            on_step=on_step,
        )
        trained = trainer.run()
    scored = project.evaluate(trainer.model, "test")
    project.save_fake_quant(trainer.model, "artifacts/qat.safetensors")
    write_history("reports/qat/history.csv", trained.history)
    write_metrics(
        "reports/qat/metrics.json",
        "qat",
        {
            project.metric().name: scored.value,
            "images": scored.images,
            "train_images": len(train),  # type: ignore[arg-type]
            "best_epoch": trained.best,
            "epochs": section.epochs,
        },
    )
    discard_scratch(key)


if __name__ == "__main__":
    main()
