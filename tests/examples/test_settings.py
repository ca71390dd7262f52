from __future__ import annotations

from pathlib import Path

import pytest

from examples.fashion_mnist.train import FOLDER
from examples.settings import load_settings
from qatlib.errors import ConfigError


def test_wrong_params_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((FOLDER / "params.yaml").read_text().replace("epochs: 4", "epochz: 4").replace("lr: 0.1", "lr: -1"))
    with pytest.raises(ConfigError, match="QAT101") as caught:
        load_settings(path)
    assert {"train.epochs", "train.epochz", "train.lr"} <= {
        line.split(":")[0].strip() for line in str(caught.value).splitlines()
    }


@pytest.mark.parametrize("text", [None, "train: [", ""])
def test_unreadable_params(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"QAT10[01]"):
        load_settings(path)
