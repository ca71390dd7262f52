"""Reports as git has them: the pipelines of a CI run have overwritten those in the folders by the time tests look."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]


def text(path: str) -> str:
    """Content of ``path`` (from the root of the project) that is committed or added."""
    done = subprocess.run(["git", "show", f":{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{path} is not in git: make examples, then commit it"
    return done.stdout


def scores(name: str) -> dict[str, dict[str, float]]:
    """``scores.json`` of an example: values by metric for each form."""
    found: dict[str, dict[str, float]] = document(f"examples/{name}/reports/scores.json")
    return found


def metrics(name: str, stage: str) -> dict[str, float]:
    """The one section of a stage's metrics."""
    (section,) = document(f"examples/{name}/reports/{stage}/metrics.json").values()
    return dict(section)


def is_recorded(name: str, artifact: str) -> bool:
    """Whether the artifact in the folder of an example is, to the byte, the one of its ``dvc.lock`` in git."""
    lock = YAML(typ="safe").load(text(f"examples/{name}/dvc.lock"))
    (known,) = [out["md5"] for stage in lock["stages"].values() for out in stage["outs"] if out["path"] == artifact]
    content = (ROOT / "examples" / name / artifact).read_bytes()
    return bool(hashlib.md5(content, usedforsecurity=False).hexdigest() == known)


def document(path: str) -> Any:
    return json.loads(text(path))


def shown(name: str) -> dict[str, str]:
    """The cells of an example's row in the first table of docs/examples.md, by heading."""
    lines = (ROOT / "docs" / "examples.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| [{name}]")]
    heading = next(line for line in lines if line.startswith("| example | task"))
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (heading, row))
    return dict(zip(*cells, strict=True))
