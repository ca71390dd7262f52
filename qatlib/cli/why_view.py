"""What would rerun, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from qatlib.analysis.compare_view import value
from qatlib.pipeline.why import MISSING, ParamChange, Why


def lines(found: Sequence[Why]) -> Text:
    """A heading per stage with its reasons below, and how many run in all."""
    text = Text()
    width = max((len(one.stage) for one in found), default=0)
    for one in found:
        how, style = ("runs", "bold yellow") if one.runs else ("up to date", "green")
        if one.frozen:
            how, style = "frozen: never runs", "dim"
        elif one.runs and not (one.params or one.inputs or one.outputs):
            how = "may run"
        text.append(f"{one.stage.ljust(width)}  ").append(f"{how}\n", style=style)
        for param in one.params:
            text.append(f"  {param.file}: {param.key} was {_shown(param, 'old')}, is {_shown(param, 'new')}\n")
        for reason in (*one.inputs, *one.outputs):
            text.append(f"  {reason}\n")
        if one.after and not one.frozen:
            own = one.params or one.inputs or one.outputs
            makes = "it makes" if len(one.after) == 1 else "they make"
            text.append(f"  after {', '.join(one.after)}" + ("\n" if own else f", if what {makes} changes\n"))
    count = sum(one.runs for one in found)
    return text.append(f"dvc repro runs {'up to ' if count else ''}{count} of {len(found)} stages", style="bold")


def _shown(param: ParamChange, which: str) -> str:
    found = getattr(param, which)
    return MISSING if found is MISSING else value(found)
