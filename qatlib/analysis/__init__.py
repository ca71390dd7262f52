"""Where accuracy goes: capture, similarity, findings, summary and the report."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Facts": "facts",
    "capture_pair": "profiler",
    "featuremap_similarity": "profiler",
    "input_facts": "facts",
    "model_profiler": "profiler",
    "program_facts": "op_facts",
    "publish": "outcome",
    "read_metrics": "summary",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and jinja2 cost seconds that a command which only reads JSON should not pay."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
