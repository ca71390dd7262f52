"""Match strings: exact, glob, regular expression; every entry must hit something."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qatlib.errors import ConfigError
from qatlib.pipeline.match import Pattern, first_match, resolve

NAMES = ["stem", "block1", "block1.conv", "block1.relu", "block2", "block2.conv", "head"]


@dataclass(frozen=True)
class Record:
    match: str
    value: int = 0


@pytest.mark.parametrize(
    ("text", "matched"),
    [
        ("block1", ["block1"]),
        ("block1.*", ["block1.conv", "block1.relu"]),
        ("*.conv", ["block1.conv", "block2.conv"]),
        ("block?", ["block1", "block2"]),
        (r"re:block\d\.relu", ["block1.relu"]),
        ("re:block", []),
        ("BLOCK1", []),
    ],
)
def test_pattern(text: str, matched: list[str]) -> None:
    assert [name for name in NAMES if Pattern(text).matches(name)] == matched


def test_a_name_with_glob_characters_matches_itself() -> None:
    assert Pattern("x[0]").matches("x[0]")


def test_resolve_covers_submodules_in_the_order_of_names() -> None:
    assert resolve(["head", "block1"], NAMES, "qat.hybrid") == ("block1", "block1.conv", "block1.relu", "head")


def test_a_container_that_is_no_name_itself_covers_its_modules() -> None:
    assert resolve(["block1"], ["stem", "block1.conv", "block10.conv"], "qat.hybrid") == ("block1.conv",)


def test_resolve_of_nothing_is_nothing() -> None:
    assert resolve([], NAMES, "qat.hybrid") == ()


def test_a_miss_names_its_key_and_a_near_name() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(["head", "block1.cnv"], NAMES, "qat.hybrid")
    assert caught.value.code == "QAT102"
    assert "qat.hybrid[1]: 'block1.cnv' matches nothing; did you mean 'block1.conv'" in str(caught.value)


def test_all_misses_come_together() -> None:
    with pytest.raises(ConfigError, match=r"2 problems\n  qat.hybrid\[0\]: 'zzz'(.|\n)*qat.hybrid\[1\]: 'qqq'"):
        resolve(["zzz", "qqq"], NAMES, "qat.hybrid")


def test_broken_regular_expression() -> None:
    with pytest.raises(ConfigError, match=r"QAT102 convert.preserve\[0\]: 're:\(' is not a regular expression"):
        resolve(["re:("], NAMES, "convert.preserve")


def test_first_record_wins_in_file_order() -> None:
    first, second = Record("block1.conv", 1), Record("*.conv", 2)
    assert first_match([first, second], NAMES, "qconfig.overrides") == {"block1.conv": first, "block2.conv": second}


def test_a_record_that_never_applies_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        first_match([Record("*"), Record("head")], NAMES, "qconfig.overrides")
    assert "qconfig.overrides[1].match: 'head' is never used: qconfig.overrides[0] comes first" in str(caught.value)


def test_a_record_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"QAT102 qconfig.overrides\[0\].match: 'haed' matches nothing; did you mean"):
        first_match([Record("haed")], NAMES, "qconfig.overrides")
