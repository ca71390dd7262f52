from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.fashion_mnist import fetch, source
from examples.fashion_mnist.fetch import Contents, UnavailableError
from qatlib.errors import DataError
from tests.examples.conftest import write_folder

IMAGES = "t10k-images-idx3-ubyte"


@pytest.fixture
def asked(cache: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the places asked so far; all but the installed package have the files."""
    names: list[str] = []

    def has(name: str) -> Callable[..., Contents]:
        def get(*_: object) -> Contents:
            names.append(name)
            return contents

        return get

    monkeypatch.setattr(fetch, "from_debian_package", has("package"))
    monkeypatch.setattr(fetch, "from_official", has("official"))
    return names


def lacks(*_: object) -> Contents:
    raise UnavailableError("the line is dead")


def test_root_is_read_and_nothing_is_cached(root: Path, cache: Path) -> None:
    images, labels = source.read_part("t10k", root)
    assert images.shape == (10_000, 2, 2)
    np.testing.assert_array_equal(labels, np.arange(10_000) % 10)
    assert not cache.exists()


def test_root_may_be_compressed(cache: Path, contents: Contents, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "packed", contents, packed=True)
    assert source.read_part("train", folder)[0].shape == (60_000, 2, 2)


def test_a_file_missing_in_root_is_an_error_though_other_places_have_it(root: Path, asked: list[str]) -> None:
    (root / IMAGES).unlink()
    with pytest.raises(DataError, match=f"QAT116 Fashion-MNIST root: {root} has neither {IMAGES} nor {IMAGES}.gz"):
        source.read_part("t10k", root)
    with pytest.raises(DataError, match=f"QAT116 Fashion-MNIST root: {root / 'typo'} is not a folder"):
        source.read_part("t10k", root / "typo")
    assert asked == []


def test_an_altered_file_in_root_is_an_error(root: Path) -> None:
    path = root / IMAGES
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"QAT117 {path}: has SHA-256"):
        source.read_part("t10k", root)


def test_the_installed_package_comes_before_any_download(
    asked: list[str], cache: Path, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "INSTALLED", write_folder(tmp_path / "installed", contents, packed=True))
    source.read_part("t10k")
    assert asked == []
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == contents


def test_the_package_is_downloaded_before_the_official_address_is_asked(asked: list[str]) -> None:
    source.read_part("t10k")
    assert asked == ["package"]


def test_the_official_address_is_last(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "from_debian_package", lacks)
    assert source.read_part("t10k")[0].shape == (10_000, 2, 2)
    assert asked == ["official"]


def test_an_altered_installed_package_is_passed_over(
    asked: list[str], contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "installed", contents | {IMAGES: b"short"}, packed=False)
    monkeypatch.setattr(fetch, "INSTALLED", folder)
    assert source.read_part("t10k")[0].shape == (10_000, 2, 2)
    assert asked == ["package"]


def test_the_second_read_is_from_the_cache(asked: list[str]) -> None:
    first = source.read_part("train")
    second = source.read_part("train")
    source.read_part("t10k")
    assert asked == ["package"]
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_cache_is_filled_again(asked: list[str], cache: Path, contents: Contents, damage: str) -> None:
    source.read_part("t10k")
    path = cache / IMAGES
    content = path.read_bytes()
    path.write_bytes(content[:50] if damage == "truncated" else bytes(len(content)))
    if damage == "missing":
        path.unlink()
    np.testing.assert_array_equal(source.read_part("t10k")[1], np.arange(10_000) % 10)
    assert asked == ["package", "package"]
    assert path.read_bytes() == contents[IMAGES]


def test_the_error_lists_what_was_tried_when_nothing_works(
    cache: Path, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "INSTALLED", write_folder(tmp_path / "bad", contents | {IMAGES: b"x"}, packed=False))
    monkeypatch.setattr(fetch, "from_official", lacks)
    with pytest.raises(DataError) as caught:
        source.read_part("t10k")
    assert caught.value.code == "QAT116"
    lines = str(caught.value).splitlines()
    assert (
        lines[1]
        == f"  installed package: {tmp_path / 'bad' / IMAGES} holds 1 bytes; {IMAGES} has {len(contents[IMAGES])}"
    )
    assert lines[2] == "  Debian package: not in this test"
    assert lines[3].startswith("  official download: the line is dead.")
    assert "as root" in lines[4]
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with pytest.raises(DataError, match=r"QAT116 .*cannot be written .*Set XDG_CACHE_HOME"):
        source.read_part("t10k")


@pytest.mark.parametrize("variable", ["", "relative/folder"])
def test_the_cache_is_under_home_without_an_absolute_xdg_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.cache_folder() == tmp_path / ".cache" / "qatlib-examples" / "fashion-mnist"
