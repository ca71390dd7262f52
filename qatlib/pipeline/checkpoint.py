"""Weights in files: read without ever running code from them, loaded strictly, written byte for byte alike."""

from __future__ import annotations

import difflib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qatlib.atomic import write_bytes
from qatlib.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_METADATA_KEY = "qatlib"
_AGAIN = "Write the file again, or fetch it again (dvc pull)"


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file or the state_dict in a ``.pt``/``.pth`` file, on the CPU.

    A dict under "state_dict", "model_state_dict" or "model", and the prefixes of DataParallel and torch.compile, are
    unwrapped. Raises CheckpointError QAT120 (missing, empty), QAT121 (damaged), QAT122 (holds code), QAT123 (holds
    something other than tensors by name).
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError("QAT120", str(path), kind, "Correct model.checkpoint, train the float model, or dvc pull")
    if path.stat().st_size == 0:
        raise CheckpointError("QAT120", str(path), "is empty (0 bytes)", _AGAIN)
    if path.suffix == ".safetensors":
        weights: Any = _read_safetensors(path)
    elif path.suffix in (".pt", ".pth"):
        weights = _unwrap(_read_torch(path), path)
    else:
        raise CheckpointError(
            "QAT123", str(path), f"has suffix {path.suffix!r}", "Save it as .safetensors, or as .pt or .pth"
        )
    if not weights:
        raise CheckpointError("QAT123", str(path), "holds no tensors", "Save model.state_dict()")
    return _without_prefix(weights)


def load_into(model: nn.Module, path: str | Path) -> None:
    """Load ``path`` into ``model``, every tensor of it and nothing else.

    Raises what :func:`load_weights` raises, and CheckpointError QAT124 (missing or unexpected names), QAT125 (shapes),
    QAT126 (NaN or infinity). The model is unchanged after an error.
    """
    weights = load_weights(path)
    expected = model.state_dict()
    _check_names(expected, weights, str(path))
    wrong = [
        f"{name} is {list(tensor.shape)} in the file and {list(expected[name].shape)} in the model"
        for name, tensor in weights.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(
            "QAT125",
            str(path),
            f"does not fit the model: {_first(wrong, '; ')}",
            "Give model.kwargs that it was trained with",
        )
    for name, tensor in weights.items():
        check_finite_tensor(name, tensor, str(path))
    model.load_state_dict(weights)


def check_finite_tensor(name: str, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError QAT126 if ``tensor`` holds NaN or infinity."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            "QAT126",
            f"{where} {name}",
            f"{bad} of {tensor.numel()} values are NaN or infinite",
            "The training diverged; use an earlier checkpoint",
        )


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors, whole or not at all; equal arguments give equal bytes. Metadata: :func:`read_metadata`."""
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    # One key: safetensors writes several in the order of a randomly seeded hash map.
    document = {_METADATA_KEY: json.dumps(dict(metadata or {}), sort_keys=True)}
    write_bytes(path, safetensors.torch.save(plain, metadata=document))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The ``metadata`` that :func:`save_tensors` wrote; empty for a file of other origin. Raises QAT120, QAT121."""
    if not Path(path).is_file():
        raise CheckpointError("QAT120", str(path), "does not exist", "Run the stage that writes it")
    try:
        with safe_open(path, framework="pt") as file:
            document = file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(Path(path), error) from None
    found: dict[str, str] = json.loads(document.get(_METADATA_KEY, "{}"))
    return found


def _damaged(path: Path, error: Exception) -> CheckpointError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError("QAT121", str(path), f"is truncated or of another format ({first})", _AGAIN)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        found = safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None
    return {name: found[name] for name in sorted(found)}  # safetensors gives them in random order


def _read_torch(path: Path) -> Any:
    head = path.read_bytes()[:2]
    if head == b"PK" and not zipfile.is_zipfile(path):
        raise _damaged(path, ValueError("its zip directory is missing"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if head != b"PK" and head[:1] != b"\x80":
            raise _damaged(path, ValueError("neither a zip file nor a pickle")) from None
        raise CheckpointError(
            "QAT122",
            str(path),
            f"holds Python objects, not only tensors, and reading those could run code ({_unsafe_name(str(error))})",
            "Save torch.save(model.state_dict(), path), or safetensors",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise _damaged(path, error) from None


def _unsafe_name(message: str) -> str:
    """The part of torch's message that names the object, or its last line."""
    lines = [line.strip() for line in message.splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or message.splitlines())[0][:160]


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise CheckpointError(
            "QAT123", str(path), f"holds a {type(found).__name__}, not tensors by name", "Save model.state_dict()"
        )
    others = [f"{name} ({type(value).__name__})" for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            "QAT123", str(path), f"holds entries that are no tensors: {_first(others, ', ')}", "Save model.state_dict()"
        )
    return {str(name): tensor for name, tensor in found.items()}


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    # Files older than BatchNorm's counter lack it; torch fills it in.
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in expected]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} of {len(expected)} tensors: {_first(missing, ', ')}")
    if unexpected:
        parts.append(f"has {len(unexpected)} that the model lacks: {_first(unexpected, ', ')}")
    close = difflib.get_close_matches(unexpected[0], missing, n=1) if missing and unexpected else []
    hint = f"{unexpected[0]} may be {close[0]}" if close else "It may be of another model"
    raise CheckpointError(
        "QAT124", where, "; ".join(parts), f"{hint}: correct model.factory, model.kwargs or model.checkpoint"
    )


def _first(items: list[str], joint: str) -> str:
    return joint.join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
