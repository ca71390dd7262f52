"""Modules that a model calls several times: how often, and a copy for each call."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from qatlib.errors import GraphError
from qatlib.graph.inputs import Inputs, ordered_inputs
from qatlib.graph.snapshot import as_it_was


def get_module_called_count(model: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """How often each module inside of ``model`` is called in one forward, by qualified name; 0 for one that is not.

    The model is not changed. Raises GraphError QAT138 for example inputs that it cannot take.
    """
    inputs = ordered_inputs(model, example_inputs)
    counts: Counter[str] = Counter()
    names = {name: module for name, module in model.named_modules() if name}
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: counts.update((name,)))
        for name, module in names.items()
    ]
    try:
        with as_it_was(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: counts[name] for name in names}


def shared_modules(model: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """Number of calls of each module that is called more than once and was not given a copy for each call."""
    counts = get_module_called_count(model, example_inputs)
    return {n: k for n, k in counts.items() if k > 1 and not isinstance(model.get_submodule(n), CallsInTurn)}


class CallsInTurn(nn.Module):
    """Stands for a module that is called several times: the k-th call of a forward goes to the k-th copy.

    The copies are its children ``0``, ``1``, …. An attribute that it does not have is that of the first.
    """

    def __init__(self, module: nn.Module, calls: int, tied: bool) -> None:
        super().__init__()
        self.calls, self.made = calls, 0
        for k in range(calls):
            self._modules[str(k)] = module if k == 0 else _twin(module) if tied else copy.deepcopy(module)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.made += 1
        return self._modules[str((self.made - 1) % self.calls)](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("0"), name)


def _twin(module: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers: the very same tables, so that they stay the same whatever moves."""
    twin = copy.copy(module)
    tables = {key: copy.copy(value) for key, value in vars(module).items() if isinstance(value, dict)}
    vars(twin).update({key: own for key, own in tables.items() if key not in ("_parameters", "_buffers")})
    twin.__dict__["_modules"] = {k: child and _twin(child) for k, child in module._modules.items()}
    return twin


def unshare(
    model: nn.Module, example_inputs: Inputs, names: Iterable[str] | None = None, tied: bool = True
) -> nn.Module:
    """A copy of ``model`` with a module of its own for every call: module ``c`` becomes ``c.0``, ``c.1``, ….

    The result computes the same bits. ``names`` are modules that are called several times, by default all; what is
    inside of one is copied with it, and gets copies of its own where it is still called several times and is named,
    too. ``tied`` copies keep one set of weights, also in training; others start equal and
    then go their own ways. Calls are told apart by their order, so each forward has to make as many as the one on
    ``example_inputs``; one that does not raises GraphError QAT208. Raises QAT206 for a name that is not called twice.
    """
    model = copy.deepcopy(model)
    found = shared_modules(model, example_inputs)
    wanted = set(found if names is None else names)
    for name in wanted:
        if name not in found:
            known = f"Called several times: {', '.join(found) or 'none'}"
            raise GraphError("QAT206", name, "is no module that is called more than once", known)
    chosen = [name for name in found if name in wanted]
    while outermost := [n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)]:
        for name in outermost:
            _replace(model, name, CallsInTurn(model.get_submodule(name), found[name], tied))
        found = shared_modules(model, example_inputs)  # inside of a copy, a module may still be called twice
        chosen = [name for name in found if _original(model, name) in wanted]
    if not any(isinstance(hook, _Counting) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_Counting())
        model.register_forward_hook(_Counting(), always_call=True)
    return model


def _original(model: nn.Module, name: str) -> str:
    """The name that a module had before it was copied."""
    kept, owner = [], model
    for part in name.split("."):
        if not isinstance(owner, CallsInTurn):
            kept.append(part)
        owner = owner.get_submodule(part)
    return ".".join(kept)


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    """Put ``by`` wherever the module ``name`` is: it may have several names."""
    module = model.get_submodule(name)
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if child is module and owner is not by:
                owner._modules[key] = by


class _Counting:
    """Before and after a forward of the whole model: every call starts anew, and none was left out."""

    def __call__(self, model: nn.Module, inputs: Any, *output: Any) -> None:
        turns = {name: part for name, part in model.named_modules() if isinstance(part, CallsInTurn)}
        made = {name: part.made for name, part in turns.items()}
        for part in turns.values():
            part.made = 0
        if not output or output[0] is None:  # before, or after a forward that failed
            return
        for name, part in turns.items():
            if made[name] != part.calls:
                raise GraphError(
                    "QAT208",
                    name,
                    f"was called {made[name]} times and has {part.calls} copies, one for each call on the example"
                    " inputs",
                    "Unshare with example inputs of that kind, or leave the module shared",
                )
