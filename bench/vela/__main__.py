"""Our estimates beside Vela's: ``python -m bench.vela``. What Vela says is in the tables beside this file."""

from __future__ import annotations

from collections.abc import Iterator

import click

from bench.vela.compile import CONFIGS
from bench.vela.export import NETWORKS
from bench.vela.ours import compiled, pairs, program, rank_correlation
from bench.vela.tables import LAYERS, TOTALS, Layer, Total, read_rows

_HEAD = (
    "| network | machine | cycles, Vela | ours | SRAM peak, Vela | ours | off-chip bytes, Vela | ours "
    "| rank correlation | layers off by more than 2 × |"
)


def rows() -> Iterator[str]:
    """The table in Markdown: ours as a ratio to Vela's."""
    totals = {(total.network, total.config): total for total in read_rows(TOTALS, Total)}
    layers = read_rows(LAYERS, Layer)
    yield _HEAD
    yield "|---|---|" + "---:|" * 8
    for network in NETWORKS:
        made = program(network)
        for config in CONFIGS:
            total, executable = totals[network, config], compiled(made, config)
            both = pairs(executable, [layer for layer in layers if (layer.network, layer.config) == (network, config)])
            rank = rank_correlation([pair.ours for pair in both], [pair.vela for pair in both])
            far = sum(max(pair.ours, pair.vela) > 2 * min(pair.ours, pair.vela) for pair in both)
            yield (
                f"| {network} | {config} "
                f"| {total.cycles} | {executable.performance.cycles / total.cycles:.2f} "
                f"| {total.sram_peak} | {executable.memory.sram.peak_bytes / total.sram_peak:.2f} "
                f"| {total.off_chip_traffic} | {executable.performance.dram_bytes / total.off_chip_traffic:.2f} "
                f"| {rank:.2f} | {far} of {len(both)} |"
            )


@click.command()
def main() -> None:
    """Print the table of README.md."""
    for line in rows():
        click.echo(line)


if __name__ == "__main__":
    main()
