"""What the Program would be on each of ``compile.targets``, as their stages left it. This module imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from qatlib.errors import StageError
from qatlib.pipeline.config import yaml_values

NUMBERS = ("latency_us", "dram_bytes", "sram_peak_bytes", "refused_ops")
HEADINGS = ("target", "latency, µs", "DRAM, KiB", "SRAM peak, KiB", "refused ops")


def read_targets(params: str, read: Callable[[str], str | None]) -> dict[str, dict[str, float | None]]:
    """:data:`NUMBERS` by the names in ``compile.targets`` of the text ``params``, None for what there is not.

    ``read`` gives the text of a file, None if it is not there. Only what ``params.yaml`` names is looked at: folders of
    targets that were taken out stay behind. Raises StageError QAT195 for a file that is no report.
    """
    section = (yaml_values(params) or {}).get("compile") or {}
    names = [str(other["name"]) for other in section.get("targets") or () if isinstance(other, Mapping)]
    return {name: _numbers(name, read) for name in names if name}


def rows(found: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, ...]]:
    """As text, under :data:`HEADINGS`."""
    return [
        (name, _text(seen["latency_us"], "g"), *(_text(_kib(seen[key]), ".1f") for key in NUMBERS[1:3]),
         _text(seen["refused_ops"], "g"))
        for name, seen in found.items()
    ]  # fmt: skip


def markdown(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """A section; empty where no target is named."""
    if not found:
        return ""
    lines = ["### Other targets", "", f"| {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|---:|"]
    return "\n".join(["", *lines, *(f"| {' | '.join(row)} |" for row in rows(found))]) + "\n"


def _numbers(name: str, read: Callable[[str], str | None]) -> dict[str, float | None]:
    path = f"reports/targets/{name}/metrics.json"
    text = read(path)
    if text is None:
        return dict.fromkeys(NUMBERS)
    try:
        values: Any = json.loads(text)[name]
        return {key: None if values.get(key) is None else float(values[key]) for key in NUMBERS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError("QAT195", path, f"cannot be read ({error})", "Run dvc repro") from None


def _kib(size: float | None) -> float | None:
    return None if size is None else size / 1024


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
