"""Schema of what trains a float model on Fashion-MNIST: strict, with all wrong values reported together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qatlib.errors import ConfigError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(_Section):
    """Arguments of :func:`examples.fashion_mnist.data.build`."""

    root: str | None = None
    seed: Seed = 0
    limit: Count | None = None


class TrainSettings(_Section):
    """How the float model is trained."""

    epochs: Count
    batch_size: Count
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    seed: Seed
    threads: Count


class Settings(_Section):
    """All of ``params.yaml`` of fashion_mnist, of ``train.yaml`` of the examples that are trained on it."""

    data: DataSettings = DataSettings()
    train: TrainSettings


def load_settings(path: Path) -> Settings:
    """Read and check ``path``; raise ConfigError QAT100 if it is not YAML, QAT101 with every wrong value."""
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("QAT100", str(path), f"cannot be read ({error.strerror})", "Restore the file") from None
    except (YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError("QAT100", str(path), f"is not valid YAML: {problem}", "Correct that line") from None
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        problems = [
            f"\n  {'.'.join(map(str, item['loc'])) or 'the file'}: {item['input']!r}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(
            "QAT101", str(path), f"{len(problems)} wrong{''.join(problems)}", "\nThe comments there say what is legal"
        ) from None
