"""The ``qatlib`` command, one module for each group of its commands.

What a command needs is imported when it runs: `explain` imports no torch.
"""

from __future__ import annotations

import click

from qatlib.cli import changes, programs, results, start, tuning


@click.group()
@click.version_option(package_name="qatlib")
def main() -> None:
    """From a trained float model to exact integers; the pipeline itself is run by `dvc repro`."""


for _command in (
    start.init,
    start.check_command,
    changes.why,
    results.summary,
    changes.report,
    changes.compare,
    results.gate,
    results.explain,
    results.apply,
    results.sensitivity,
    results.profile,
    programs.export,
    tuning.perf,
    tuning.tune,
    programs.golden,
    programs.compare_dump_command,
    programs.trace,
):
    main.add_command(_command)
