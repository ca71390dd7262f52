"""Compile the Program for the target, run it from its planned memory, estimate its latency."""

from __future__ import annotations

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage

REPORTS = "reports/compile_sim"


@stage("compile_sim")
def main(config: Config) -> None:
    """Compile; check that every output element equals the Program's; score what runs from planned memory.

    A Program that the target refuses is a result, not a failure: the refusals are written and the pipeline goes on.
    """
    from dataclasses import asdict

    from qatlib.atomic import atomic_folder, write_csv, write_json
    from qatlib.compiler import load_target, try_compile
    from qatlib.compiler.executable import CONTENTS
    from qatlib.compiler.perf import COLUMNS
    from qatlib.pipeline.metrics import evaluate, write_metrics
    from qatlib.pipeline.project import Project
    from qatlib.pipeline.scoring import check_compiled
    from qatlib.program import Program

    project = Project(config)
    program, target = Program.load("artifacts/program"), load_target(config.compile.target)
    executable, violations = try_compile(program, target, config.compile.options)
    refusals = [asdict(violation) for violation in violations]
    write_json(f"{REPORTS}/refusals.json", {"target": target.name, "refusals": refusals})
    if executable is None:
        with atomic_folder("artifacts/executable", CONTENTS) as folder:
            write_json(folder / "refused.json", refusals)
        write_json(f"{REPORTS}/performance.json", {})
        write_csv(f"{REPORTS}/performance.csv", COLUMNS, ())
        write_metrics(f"{REPORTS}/metrics.json", "compiled", {"refused_ops": len({one["op"] for one in refusals})})
        return
    checked = check_compiled(project, program, executable, config.compile.check_images)
    # On the CPU, whose memory the plan divides.
    scored = evaluate(lambda *x: program.nest(executable.run(*x)), project.batches("test"), project.metric(), "cpu")
    executable.save("artifacts/executable")
    executable.performance.write_json(f"{REPORTS}/performance.json")
    executable.performance.write_csv(f"{REPORTS}/performance.csv")
    write_metrics(
        f"{REPORTS}/metrics.json",
        "compiled",
        {
            project.metric().name: scored.value,
            "images": scored.images,
            "check_images": checked,
            "differing_elements": 0,
            "refused_ops": 0,
            "latency_us": executable.performance.latency_us,
        },
    )


if __name__ == "__main__":
    main()
