"""What a code means: the page of a finding's rule, the line of an error in its table.

The pages are ``docs/rules`` and ``docs/errors.md``, to which links in ``qatlib/pages`` lead; a wheel holds the files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.text import Text

from qatlib.analysis.findings import SEVERITY_STYLES, Finding, Found, evidence_text
from qatlib.errors import ConfigError, StageError

PAGES = Path(__file__).parents[1] / "pages"
_ROW = re.compile(r"^\| (QAT\d{3}) \| (.*) \| (.*) \|$")


def page(code: str, pages: Path = PAGES) -> str:
    """Markdown on ``code``, which may also be written ``qat31`` or ``31``.

    Raises ConfigError QAT227 for an unknown code, with the nearest ones; StageError QAT228 where the pages are not
    installed.
    """
    known = {**_rules(pages), **_errors(pages)}
    if (name := full_code(code)) not in known:
        near = ", ".join(_nearest(name, sorted(known)))
        seen = "is the code of no finding and no error"
        raise ConfigError("QAT227", code, seen, f"Nearest are {near}" if near else "Codes read QAT001")
    return known[name]


def full_code(code: str) -> str:
    """``code`` as it is written everywhere: ``QAT031`` for ``31`` or ``qat31``."""
    short = re.fullmatch(r"(?:QAT)?(\d{1,3})", code, re.IGNORECASE)
    return f"QAT{int(short[1]):03}" if short else code


def explanation(text: str, found: Found) -> Group:
    """What was found in the last run, above the Markdown ``text`` of the page; for ``rich.print``."""
    shown = [_shown(finding) for finding in found.findings]
    shown += [_shown(one.finding, f"  ignored: {one.reason}") for one in found.ignored]
    return Group(*shown, Markdown(text))


def _shown(finding: Finding, ignored: str = "") -> Group:
    head = Text(f"{finding.severity} {finding.code}", style=SEVERITY_STYLES[finding.severity])
    head.append(f" {finding.module + ': ' if finding.module else ''}{finding.title}", style="default not bold")
    lines: list[Text | Syntax] = [head, Text(f"  {evidence_text(finding)}")]
    if ignored:
        return Group(*lines, Text(ignored), Text())
    if finding.edit:
        lines += [Text("  change:"), Syntax(finding.edit, "yaml", background_color="default", padding=(0, 4))]
    if finding.command:
        lines.append(Text(f"  try: {finding.command}", no_wrap=True, overflow="ignore"))
    return Group(*lines, Text())


def _rules(pages: Path) -> dict[str, str]:
    found = {path.stem: path.read_text(encoding="utf-8") for path in (pages / "rules").glob("QAT*.md")}
    if not found:
        raise _missing(pages / "rules")
    return found


def _errors(pages: Path) -> dict[str, str]:
    """A page for each row of the tables, under the title of its section."""
    try:
        lines = (pages / "errors.md").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise _missing(pages / "errors.md") from None
    found, section = {}, ""
    for line in lines:
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif row := _ROW.match(line):
            code, what, cure = row.groups()
            found[code] = f"# {code}\n\n{section}\n\n**What:** {what}\n\n**Cure:** {cure}\n"
    return found


def _missing(path: Path) -> StageError:
    return StageError(
        "QAT228", str(path), "is not there: the pages were not installed", "Install a wheel, or a clone with its links"
    )


def _nearest(code: str, known: Sequence[str]) -> list[str]:
    if (number := re.fullmatch(r"QAT(\d{3})", code)) is not None:
        return sorted(sorted(known, key=lambda other: abs(int(other[3:]) - int(number[1])))[:3])
    return difflib.get_close_matches(code.upper(), known, n=3)
