"""What each level of ``opt`` is worth on the networks of ``bench.vela``: ``python -m bench.levels``.

Prints the table of ``docs/targets.md``, section Options: cycles as ratios to those of O2, DRAM bytes for the objective
``bandwidth`` in brackets, and the processor's seconds that O3 takes on one thread, the best of three.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import click
import torch

from bench.vela.export import NETWORKS
from bench.vela.ours import program
from qatlib.compiler import Executable, compile_model, load_target

TARGETS = ("bernoulli-like", "bayes-like", "nash-like", "ethos-u55-256-like", "ethos-u85-512-like")
_HEAD = "| network | target | O0 | O1 | O3 | `bandwidth` at O2 | at O3 | s |"


def rows(runs: int) -> Iterator[str]:
    """The table in Markdown, line by line."""
    yield _HEAD
    yield "|---|---|" + "---:|" * 6
    for name in NETWORKS:
        network = program(name)
        for target_name in TARGETS:
            target = load_target(target_name)

            def compiled(opt: str, objective: str = "latency") -> Executable:
                return compile_model(network, target, {"opt": opt, "objective": objective, "time_limit_s": 3600})  # noqa: B023

            base = compiled("O2").performance
            seconds = []
            for _ in range(runs):
                begin = time.process_time()
                best = compiled("O3")
                seconds.append(time.process_time() - begin)
            cycles = [one.performance.cycles / base.cycles for one in (compiled("O0"), compiled("O1"), best)]
            moved = [
                compiled(opt, "bandwidth").performance.dram_bytes / max(1, base.dram_bytes) for opt in ("O2", "O3")
            ]
            cells = [*(f"{ratio:.2f}" for ratio in cycles), *(f"({ratio:.2f})" for ratio in moved)]
            yield f"| {name} | `{target_name}` | {' | '.join(cells)} | {min(seconds):.1f} |"


@click.command()
@click.option("--runs", default=3, show_default=True, help="Searches behind a time.")
def main(runs: int) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for line in rows(runs):
        click.echo(line)


if __name__ == "__main__":
    main()
