"""The user's model as it was before something called its ``forward``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn


class Snapshot:
    """Attributes, registered tensors and train modes of every module, and what the buffers hold.

    Lists, dicts and sets that are attributes are remembered one level deep. Parameters are not copied: only training
    changes them.
    """

    def __init__(self, model: nn.Module) -> None:
        scripted, plain = dict[str, nn.Module](), dict[str, nn.Module]()
        for name, module in model.named_modules():
            (scripted if isinstance(module, torch.jit.ScriptModule) else plain)[name] = module
        self._modes = [(module, module.training) for module in scripted.values()]
        self._attributes = [(name, module, type(module), dict(vars(module))) for name, module in plain.items()]
        self._inside = [
            (module, kind, value, value.copy())
            for _, module, kind, attributes in self._attributes
            for value in attributes.values()
            if isinstance(value, list | dict | set)
        ]
        self._contents = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()
                          if not buffer.is_inference()]  # fmt: skip

    def traced(self) -> list[str]:
        """Qualified names of the attributes and buffers that ``forward`` assigned while it was traced."""
        return [
            f"{path}.{name}".strip(".")
            for path, module, _, _ in self._attributes
            for name, value in {**vars(module), **module._buffers}.items()
            if isinstance(value, fx.Proxy)
        ]

    def restore(self) -> None:
        """Put everything back in place; a lazy module that has become another type stays that."""
        for _, module, kind, attributes in self._attributes:
            if type(module) is kind:
                vars(module).clear()
                vars(module).update(attributes)
        for module, kind, inside, copied in self._inside:
            if type(module) is kind:
                inside.clear()
                inside.extend(copied) if isinstance(inside, list) else inside.update(copied)
        for module, training in self._modes:
            module.training = training
        with torch.no_grad():
            for buffer, version, content in self._contents:
                if buffer._version != version:
                    buffer.copy_(content)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[Snapshot]:
    """Run a block with ``model`` at inference, without gradients; afterwards the model is what it was before."""
    snapshot = Snapshot(model)
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield snapshot
    finally:
        snapshot.restore()
