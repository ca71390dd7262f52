"""Fine-tune the calibrated model with fake-quant on; keep the epoch whose integers score best."""

from __future__ import annotations

from pathlib import Path

import qatlib
from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import discard_scratch, fingerprint, scratch_dir, stage

CALIBRATED = "artifacts/calibrated.safetensors"


@stage("qat", parallel=True)
def main(config: Config) -> None:
    """Train; a run that was cut off goes on where it stopped."""
    from qatlib.fake.distributed import rank
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project
    from qatlib.pipeline.reporting import step_bar, write_history
    from qatlib.pipeline.training import qat_metrics, trainer_of

    project = Project(config)
    key = fingerprint(
        config=[config.model, config.data, config.metric, config.qconfig, config.qat, config.runtime],
        start=Path(CALIBRATED),
        code=[Path(config.model.code), Path(config.data.code), Path(qatlib.__file__).parent],
    )
    with step_bar("qat") as shown:
        trainer = trainer_of(project, CALIBRATED, scratch_dir(key) if rank() == 0 else None, shown)
        trained = trainer.run()
    if rank() > 0:
        return
    scored = project.evaluate(trainer.model, "test")
    project.save_fake_quant(trainer.model, "artifacts/qat.safetensors")
    write_history("reports/qat/history.csv", trained.history)
    write_metrics("reports/qat/metrics.json", "qat", qat_metrics(project, trained, scored))
    discard_scratch(key)


if __name__ == "__main__":
    main()
