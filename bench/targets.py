"""The bundled example and the reference models on every shipped target: ``python -m bench.targets``.

Reads what their pipelines left (``make examples``) and writes ``docs/target-table.md``. ``--artifacts`` reads those of
another working copy.
"""

from __future__ import annotations

from pathlib import Path

import click

from qatlib.atomic import write_text
from qatlib.cli.common import one_line_errors
from qatlib.cli.perf_view import LAST, SUMMARY, accuracy_ratio
from qatlib.compiler.perf import BASIS
from qatlib.compiler.table import HEADINGS, cells, markdown, on_targets
from qatlib.compiler.target import shipped_targets
from qatlib.program import Program

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "target-table.md"
MODELS = {
    "fashion_mnist": ".",
    **{
        name: f"examples/{name}"
        for name in ("efficientnet_lite0", "sentence_encoder", "detector", "warp", "recurrent", "hard_case")
    },
}
"""Folders of the pipelines by the name of the model; the bundled example's is the root."""
TEXT = f"""# Reference models on the shipped targets

Made by `python -m bench.targets` after `make repro` and `make examples`. Every figure but the accuracy is an
{BASIS}: latency is of one inference of batch 1, DRAM what it moves, SRAM peak the most that the plan has in use. The
accuracy ratio is that of the integers to float on the test split; a target changes no integer, it takes a Program or
refuses it, and then the codes say why ([what is refused](targets.md#what-is-refused); `qatlib perf --json` lists the
ops). The same for a project of yours, in its folder: `qatlib perf --target bayes-like --target nash-like`.

"""


@click.command()
@click.option("--artifacts", default=ROOT, type=click.Path(path_type=Path), help="Working copy to read from.")
def main(artifacts: Path) -> None:
    """Write ``docs/target-table.md``."""
    lines = []
    with one_line_errors():
        for name, folder in MODELS.items():
            ratio = accuracy_ratio(artifacts / folder / SUMMARY)
            shown = "–" if ratio is None else f"{ratio:.4f}"
            for row in on_targets(Program.load(artifacts / folder / LAST), shipped_targets()):
                lines.append((name, shown, *cells(row)))
                click.echo(" | ".join(lines[-1]))
    write_text(PAGE, TEXT + markdown(lines, ("model", "accuracy ratio", *HEADINGS)))


if __name__ == "__main__":
    main()
