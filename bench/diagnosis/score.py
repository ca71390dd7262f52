"""Run the pipeline on every planted fault and on the clean networks, and read what the findings say."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import nn

from bench.diagnosis.faults import Fault, Params
from bench.diagnosis.nets import NETS, train
from qatlib.atomic import write_csv
from qatlib.pipeline.checkpoint import save_tensors
from stages import analyze, calibrate, compile_sim, convert, float_check, qat

ROOT = Path(__file__).parents[2]
STAGES = (float_check.main, calibrate.main, qat.main, convert.main, compile_sim.main, analyze.main)
TOP = 3
BASE: Params = {
    "model": {"factory": "bench.diagnosis.nets:build", "checkpoint": "float.safetensors"},
    "data": {"factory": "bench.diagnosis.nets:data", "batch_size": 250},
    "qconfig": {"inputs": [{"match": "x", "scale": 1 / 128}]},
    "calibrate": {"batches": 4, "batch_size": 64},
    "qat": {"epochs": 0, "batch_size": 64, "lr": 1.0e-4},
    "compile": {"check_images": 8, "target": "qatlib/targets/bayes-like.yaml"},
    "analyze": {"batches": 2, "batch_size": 64, "sensitivity": None},
    "float_check": {"floor": 0.7, "max_train_val_gap": 0.2, "gap_images": 512},
}


@dataclass(frozen=True)
class Row:
    """``rank`` of the finding that names the fault, 0 if none does; what else was found beyond remarks and what follows
    from the fault, as ``code module``, is ``false_alarms``.
    """

    fault: str
    net: str
    code: str
    module: str
    rank: int
    findings: int
    false_alarms: str

    @property
    def planted(self) -> tuple[str, str, str, str]:
        """What tells a row from the others, as of its fault."""
        return self.fault, self.net, self.code, self.module

    @property
    def found(self) -> bool:
        return 0 < self.rank <= TOP


def clean(net: str) -> Fault:
    return Fault("none", net, "", "")


def score(fault: Fault, folder: Path) -> Row:
    """Plant ``fault`` in a project in ``folder``, run the stages and look for it."""
    findings = diagnosed(fault, folder)
    ranks = [
        rank
        for rank, finding in enumerate(findings, 1)
        if finding["code"] == fault.code and fault.module in ("", finding["module"])
    ]
    expected = {fault.code, *fault.also}
    alarms = [
        f"{f['code']} {f['module']}".strip() for f in findings if f["severity"] != "info" and f["code"] not in expected
    ]
    return Row(fault.name, fault.net, fault.code, fault.module, min(ranks, default=0), len(findings), "; ".join(alarms))


def diagnosed(fault: Fault, folder: Path) -> list[dict[str, Any]]:
    """``reports/findings.json`` of the pipeline, run in ``folder``."""
    save_tensors(folder / "float.safetensors", planted(fault).state_dict())
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    over: Params = {
        "model": {"kwargs": {"net": fault.net, **fault.model}, "code": str(ROOT / "bench/diagnosis/nets.py")},
        "data": {"kwargs": dict(fault.data), "code": str(ROOT / "bench/diagnosis/nets.py")},
    }
    for part in (BASE, over, fault.params):
        for section, values in part.items():
            params[section].update(values)
    params["goals"] = [{"metric": "ratio.calib", "min": 0.97}, {"metric": "ratio.integer", "min": 0.97}]
    params["compile"]["target"] = str(ROOT / params["compile"]["target"])
    with contextlib.chdir(folder):
        YAML(typ="safe").dump(params, Path("params.yaml"))
        for stage in STAGES:
            with _quiet():
                stage.main([], standalone_mode=False)
        found: list[dict[str, Any]] = json.loads(Path("reports/findings.json").read_text())["findings"]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the stages' own output, which is shown if one fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            yield
        except SystemExit as end:
            raise RuntimeError(said.getvalue()) from end


def planted(fault: Fault) -> nn.Module:
    model = NETS[fault.net](**fault.model)
    model.load_state_dict(_trained(fault).state_dict())
    fault.weights(model)
    return model.eval()


def _trained(fault: Fault) -> nn.Module:
    if fault.late:
        return trained(fault.net)
    return trained(fault.net, fault.model.get("fault", ""), fault.data.get("fault", ""), fault.data.get("limit"))


@cache
def trained(net: str, fault: str = "", data_fault: str = "", limit: int | None = None) -> nn.Module:
    torch.set_num_threads(1)
    return train(net, fault, data_fault, limit)


# -- the table ---------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_csv(path, [field.name for field in fields(Row)], map(astuple, rows))


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(**{**row, "rank": int(row["rank"]), "findings": int(row["findings"])}) for row in csv.DictReader(file)
        ]


def markdown(rows: Iterable[Row]) -> str:
    """The table of ``docs/diagnosis.md``."""
    lines = ["| planted | network | to be found | rank | findings | false alarms |", "|---|---|---|---|---|---|"]
    for row in rows:
        wanted = f"{row.code} {f'`{row.module}`' if row.module else ''}".strip() or "nothing"
        rank = "" if not row.code else str(row.rank or "**missed**")
        lines.append(f"| {row.fault} | {row.net} | {wanted} | {rank} | {row.findings} | {row.false_alarms} |")
    return "\n".join(lines)
