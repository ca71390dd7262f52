"""Assignments to elements, ``x[:, 0] = y``: a join of what stays and what is new."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qatlib.ops.base import Call, Ref, Traced
from qatlib.ops.composite import Composite
from qatlib.ops.elementwise import number, operand
from qatlib.ops.index import Cut, Slice, full_keys, slice_step, static_axis
from qatlib.ops.shape import expand_to, reshape_to
from qatlib.ops.where import Where


class Assign(Composite):
    """``x[key] = value``, ``x.copy_(value)``, ``x.fill_(number)`` and ``x.zero_()``: what x is from then on.

    A number, and anything under a mask, is a ``where``. A tensor becomes ``.slice`` and ``.cat`` of the axes that are
    cut; a step of more than 1 ends in a ``.take``.
    """

    name = "assign"
    functions = (operator.setitem,)
    methods = ("copy_", "fill_", "zero_")

    def trace(self, call: Call) -> Any:
        if call.function is operator.setitem:
            target, key, value = call.args
        else:
            found = call.bind("x", "value", value=call.kwargs.get("src", call.kwargs.get("other", 0)))
            target, key, value = found["x"], Ellipsis, found["value"]
        x = _whole(call, target, value)
        keys = list(key) if isinstance(key, tuple) else [key]
        if len(keys) == 1 and isinstance(keys[0], Ref | Tensor) and _is_mask(keys[0]):
            return Where.select(call, _over_all_axes(call, keys[0], x), _filling(call, value), x)
        if any(isinstance(k, Ref | bool) for k in keys):
            raise call.refuse("assigns to positions computed from the input", "Use torch.where")
        keys = full_keys(keys, len(x.shape))
        if number(value) is not None:
            return Where.select(call, _mask(call, x, keys), value, x)
        if any(isinstance(k, Tensor | list | range) and torch.as_tensor(k).dim() for k in keys):
            raise call.refuse("assigns a tensor to a list of positions", "Assign slice by slice, or use torch.where")
        return _assigned(call, x, keys, operand(call, value, x.content))


def _whole(call: Call, x: Any, value: Any) -> Ref:
    """What is assigned to, with its batch: a constant such as ``torch.zeros(n, 8)`` has it from the value."""
    whole = expand_to(call, call.ref(x), call.out_shape, *[v for v in (value,) if isinstance(v, Ref)])
    assert isinstance(whole, Ref)
    return whole


def _is_mask(key: Ref | Tensor) -> bool:
    return key.content == "bool" if isinstance(key, Ref) else key.dtype == torch.bool


def _filling(call: Call, value: Any) -> Any:
    if number(value) is None:
        raise call.refuse("assigns a tensor under a mask", "Use torch.where(mask, value, x)")
    return value


def _over_all_axes(call: Call, mask: Ref | Tensor, x: Ref) -> Ref:
    """A mask of the first axes of x, such that it broadcasts against x."""
    mask = call.ref(mask)
    missing = len(x.shape) - len(mask.shape)
    if not missing:
        return mask
    op, attrs = reshape_to([*mask.shape, *[1] * missing])
    return call.emit(op, [mask], attrs, suffix=".mask")


def _mask(call: Call, x: Ref, keys: Sequence[Any]) -> Tensor:
    """True at ``x[keys]`` of one sample."""
    for axis, key in enumerate(k for k in keys if k is not None):
        if x.shape[axis] < 0 and not (isinstance(key, slice) and Slice.cut(call, x.shape[axis], key) is None):
            raise call.refuse("assigns to a part of the batch axis", "Use another axis")
    mask = torch.zeros([max(size, 1) for size in x.shape], dtype=torch.bool)
    batch = next((axis for axis, size in enumerate(x.shape) if size < 0), None)
    every = slice(None)
    axis = -1
    plain = []
    for key in keys:
        axis += key is not None
        plain.append(every if axis == batch and key is not None else key)
    mask[tuple(plain)] = True
    return mask


def _assigned(call: Call, x: Ref, keys: Sequence[Any], value: Ref) -> Ref:
    cuts: dict[int, Cut] = {}
    kept: list[int] = []
    shown: list[int] = []
    axis = 0
    for key in keys:
        if key is None:
            shown.append(1)
            continue
        size = x.shape[axis]
        if isinstance(key, slice):
            if (cut := Slice.cut(call, size, key)) is not None:
                cuts[axis], size = cut, len(range(*cut))
            shown.append(size)
        else:
            at = int(key) % x.shape[static_axis(call, x, axis, "assigns to one element of")]
            cuts[axis], size = (at, at + 1, 1), 1
        kept.append(size)
        axis += 1
    value = _expanded(call, value, shown, x)
    if shown != kept:
        op, attrs = reshape_to(kept)
        value = call.emit(op, [value], attrs, suffix=".reshape")
    return written(call, x, cuts, value)


def _expanded(call: Call, value: Ref, shape: Sequence[int], like: Ref) -> Ref:
    expanded = expand_to(call, value, shape, like)
    assert not isinstance(expanded, Traced)
    return expanded


def written(call: Call, x: Ref, cuts: Mapping[int, Cut], value: Ref) -> Ref:
    """``x`` with ``value`` in place of the positions ``cuts`` of its axes; a cut axis of value has that many positions.

    Emits ``.slice``, ``.cat`` and ``.take``.
    """
    if not cuts:
        return value
    (axis, (start, stop, step)), *others = sorted(cuts.items())
    size = x.shape[axis]
    if others:
        inner = _part(call, x, axis, (start, stop, step))
        value = written(call, inner, dict(others), value)
    if step == 1:
        before = [_part(call, x, axis, (0, start, 1))] if start else []
        after = [_part(call, x, axis, (stop, size, 1))] if stop < size else []
        parts = [*before, value, *after]
        return value if len(parts) == 1 else call.emit("cat", parts, {"axis": axis}, suffix=".cat")
    both = call.emit("cat", [x, value], {"axis": axis}, suffix=".cat")
    new = {position: size + k for k, position in enumerate(range(start, stop, step))}
    index = [new.get(position, position) for position in range(size)]
    return call.emit("take", [both], {"axis": axis, "index": index}, suffix=".take")


def _part(call: Call, x: Ref, axis: int, cut: Cut) -> Ref:
    op, attrs = slice_step({axis: cut})
    return call.emit(op, [x], attrs, suffix=".slice")
