"""A :class:`Comparison` for the terminal."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qatlib.golden.compare import Comparison, Parting

WIDE = 400
_STYLE = {"equal": "green", "stored otherwise": "yellow", "differs": "red", "unusable": "red", "missing": "dim"}


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print one row per tensor, the inputs on both sides, and the first parting with its cause."""
    lines: list[Table | Text] = [_tensors(comparison)]
    if comparison.statistics:
        lines.append(_inputs(comparison))
    if comparison.unknown_files:
        lines.append(Text(f"files of no golden tensor: {', '.join(comparison.unknown_files)}"))
    if comparison.unused_names:
        lines.append(Text(f"names of the map that no file has: {', '.join(comparison.unused_names)}"))
    if comparison.first is None:
        compared = sum(result.status == "equal" for result in comparison.tensors)
        lines.append(Text(f"equal: {compared} of {len(comparison.tensors)} tensors compared", style="green"))
    else:
        lines.append(_parting("first difference", comparison.first))
        if comparison.first_numbers is not None and comparison.first_numbers.tensor != comparison.first.tensor:
            lines.append(_parting("first differing numbers, storage undone", comparison.first_numbers))
    console = console or Console()
    if not console.is_terminal:  # a file or a pipe has no width: nothing is cut
        console.width = WIDE
    console.print(Group(*lines))


def _tensors(comparison: Comparison) -> Table:
    table = _table("tensor", "op", "result", "differing", "share", "max", "mean", "unit", "note")
    for result in comparison.tensors:
        numbers = ["", "", "", "", ""]
        if result.differing:
            distances = f"{result.max_distance:.4g}", f"{result.mean_distance:.4g}"
            numbers = [f"{result.differing}/{result.elements}", f"{result.share:.3%}", *distances, result.unit]
        style = _STYLE[result.status]
        table.add_row(Text(result.name), result.kind, Text(result.status, style=style), *numbers, Text(result.note))
    return table


def _table(*heads: str) -> Table:
    """What does not fit a column goes on in its next line: nothing is cut off a name."""
    table = Table()
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _inputs(comparison: Comparison) -> Table:
    table = _table("input", "side", "sha256", "min", "max", "mean", "std")
    for name, sides in comparison.statistics.items():
        for side, seen in sides.items():
            numbers = (f"{value:.6g}" for value in (seen.min, seen.max, seen.mean, seen.std))
            table.add_row(Text(name), side, seen.sha256[:12], *numbers)
    return table


def _parting(title: str, parting: Parting) -> Text:
    text = Text(f"{title}: {parting.tensor} ({parting.kind})\n", style="bold")
    for head, cause in (("likely cause", parting.cause), *(("also explained by", other) for other in parting.also)):
        text.append(f"  {head}: {cause.text}\n", style="")
        if cause.evidence:
            shown = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in cause.evidence.items())
            text.append(f"    {', '.join(shown)}\n", style="dim")
    if parting.not_compared:
        names = ", ".join(parting.not_compared)
        text.append(f"  its inputs {names} are not known to be equal: the fault may lie before this op\n", style="")
    return text
