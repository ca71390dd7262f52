"""What-if: compile the Program for one of ``compile.targets``, check it bit for bit, estimate its latency."""

from __future__ import annotations

import click

from qatlib.pipeline.config import Config
from qatlib.pipeline.stage import stage


@stage("targets")
@click.argument("name")
def main(config: Config, name: str) -> None:
    """Compile for the target that ``compile.targets`` calls NAME; one that refuses the Program is a result, too.

    Nothing is scored: a target changes no integer, which the first ``compile.check_images`` test images confirm.
    """
    from dataclasses import asdict

    from qatlib.atomic import write_json
    from qatlib.compiler import load_target, try_compile
    from qatlib.errors import ConfigError
    from qatlib.pipeline.metrics import write_metrics
    from qatlib.pipeline.project import Project
    from qatlib.pipeline.scoring import check_compiled
    from qatlib.program import Program

    chosen = next((other for other in config.compile.targets if other.name == name), None)
    if chosen is None:
        known = ", ".join(other.name for other in config.compile.targets) or "nothing"
        raise ConfigError("QAT102", "compile.targets", f"names no {name!r}; it has {known}", "Add it, with its file")
    program, target, folder = Program.load("artifacts/program"), load_target(chosen.file), f"reports/targets/{name}"
    executable, violations = try_compile(program, target, config.compile.options)
    refusals = [asdict(violation) for violation in violations]
    write_json(f"{folder}/refusals.json", {"target": target.name, "refusals": refusals})
    if executable is None:
        write_json(f"{folder}/performance.json", {})
        write_metrics(f"{folder}/metrics.json", name, {"refused_ops": len({one["op"] for one in refusals})})
        return
    checked = check_compiled(Project(config), program, executable, config.compile.check_images)
    seen, memory = executable.performance, executable.memory
    seen.write_json(f"{folder}/performance.json")
    write_metrics(
        f"{folder}/metrics.json",
        name,
        {
            "refused_ops": 0,
            "check_images": checked,
            "differing_elements": 0,
            "latency_us": seen.latency_us,
            "dram_bytes": seen.dram_bytes,
            "sram_peak_bytes": memory.sram.peak_bytes,
            "utilization": seen.utilization,
        },
    )


if __name__ == "__main__":
    main()
