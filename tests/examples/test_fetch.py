from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from examples.fashion_mnist import fetch, idx
from examples.fashion_mnist.fetch import Contents, UnavailableError
from qatlib.errors import DataError
from tests.examples.conftest import write_folder

LABELS = "t10k-labels-idx1-ubyte"
from_debian_package, from_official = fetch.from_debian_package, fetch.from_official
Script = Callable[[str, str], None]


@pytest.fixture
def package(cache: Path, contents: Contents, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a dpkg of the test's own unpacks; the apt-get beside it downloads at once and logs its arguments."""
    monkeypatch.setattr(fetch, "INSTALLED", Path("/usr/share/datasets/fashion-mnist"))
    folder = write_folder(tmp_path / "package" / "usr" / "share" / "datasets" / "fashion-mnist", contents, packed=True)
    script("dpkg", f'test -f "$2" && cp -r "{tmp_path}/package" "$3"')
    script("apt-get", f'echo "$@" >> "{tmp_path}/log"; touch {fetch.PACKAGE}_1_all.deb')
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_the_package_is_downloaded_and_unpacked(
    package: Path, contents: Contents, scratch: Path, tmp_path: Path
) -> None:
    assert from_debian_package(idx.FILES, scratch) == contents
    assert (tmp_path / "log").read_text() == f"download {fetch.PACKAGE}\n"
    assert list(scratch.iterdir()) == []


def test_package_lists_of_its_own_are_fetched_when_the_package_is_unknown(
    package: Path, contents: Contents, scratch: Path, tmp_path: Path, script: Script
) -> None:
    script(
        "apt-get",
        f'echo "$@" >> "{tmp_path}/log"\n'
        'case "$*" in\n'
        '  *update) test -d "${2#*=}/partial" && touch "${2#*=}/fetched" ;;\n'
        f'  -o*download*) test -f "${{2#*=}}/fetched" && touch {fetch.PACKAGE}_1_all.deb ;;\n'
        '  *) echo "E: Unable to locate package" >&2; exit 100 ;;\n'
        "esac",
    )
    assert from_debian_package(idx.FILES, scratch) == contents
    plain, update, download = (tmp_path / "log").read_text().splitlines()
    assert plain == f"download {fetch.PACKAGE}"
    assert update.startswith(f"-o Dir::State::lists={scratch}/")
    assert update.removesuffix("update") == download.removesuffix(f"download {fetch.PACKAGE}")
    assert list(scratch.iterdir()) == []


def test_a_failing_apt_get_gives_its_last_line(package: Path, scratch: Path, script: Script) -> None:
    script("apt-get", 'echo "E: no route" >&2; echo "W: later remark" >&2; exit 100')
    with pytest.raises(UnavailableError, match=r"^apt-get .*update: E: no route$"):
        from_debian_package(idx.FILES, scratch)
    script("apt-get", "exit 7")
    with pytest.raises(UnavailableError, match="exit code 7"):
        from_debian_package(idx.FILES, scratch)
    assert list(scratch.iterdir()) == []


def test_an_apt_get_that_hangs_is_given_up(
    package: Path, scratch: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("apt-get", "exec sleep 30")
    monkeypatch.setattr(fetch, "_APT_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match="gave no answer"):
        from_debian_package(idx.FILES, scratch)


def test_a_system_without_apt_get(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(UnavailableError, match="no apt-get"):
        from_debian_package(idx.FILES, scratch)


def test_a_package_with_other_content(package: Path, scratch: Path) -> None:
    (package / f"{LABELS}.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(DataError, match="QAT117"):
        from_debian_package(idx.FILES, scratch)
    (package / f"{LABELS}.gz").unlink()
    with pytest.raises(UnavailableError, match="has neither"):
        from_debian_package(idx.FILES, scratch)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(cache: Path, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder behind an address on this machine that stands for the official one."""
    folder = write_folder(tmp_path / "served", contents, packed=True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        monkeypatch.setattr(fetch, "OFFICIAL", f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def test_the_official_download(served: Path, contents: Contents) -> None:
    assert from_official(idx.FILES) == contents


def test_a_file_that_the_official_address_lacks(served: Path) -> None:
    (served / f"{LABELS}.gz").unlink()
    with pytest.raises(UnavailableError, match=f"(?i){LABELS}.gz: .*not found"):
        from_official(idx.FILES)


def test_a_download_cut_short(served: Path) -> None:
    path = served / f"{LABELS}.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=f"QAT117 http://.*{LABELS}.gz: is not a whole gzip file"):
        from_official(idx.FILES)


def test_an_address_that_nobody_serves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "OFFICIAL", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UnavailableError, match="refused"):
        from_official(idx.FILES)
