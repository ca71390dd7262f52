"""Every kind of cause that ``docs/golden.md`` lists is planted somewhere in this folder, and no other is named."""

from __future__ import annotations

import re
from pathlib import Path

from tests.golden.test_codes import CODES, ISLAND
from tests.golden.test_inputs import FRONT, IDS
from tests.golden.test_recomputed import RECOMPUTED, SATURATED, TIES
from tests.golden.test_storage import STORED

DOCS = Path(__file__).parents[2] / "docs" / "golden.md"


def test_every_documented_kind_is_planted() -> None:
    text = DOCS.read_text(encoding="utf-8").split("## Causes")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = {kind for row in rows for kind in re.findall(r"`([^`]+)`", row)}
    tables = (STORED, CODES, ISLAND, RECOMPUTED, SATURATED, TIES)
    planted = {fault.kinds for table in tables for fault in table.values()}
    planted |= {kind for _, kind, _ in (*FRONT.values(), *IDS.values()) if kind}
    assert planted | {"file"} == documented
