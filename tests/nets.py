"""Random small networks: seeded, deterministic, made of what the operators of ``qatlib`` take.

A net grows step by step. A step picks values that exist, computes a new one with a module or function, and stays if the
result is finite, of moderate size, and not made of the last bits of its inputs. Values of a batch are images
``[N, C, H, W]``, sequences ``[N, L, D]``, vectors ``[N, D]``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.fake.prepare import fuse_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.graph.ir import INPUT
from qatlib.ops.base import BY_NAME
from tests.models import lively
from tests.net_steps import STEPS, Draw, Made, Picked

LARGEST = 300.0
"""A step whose values pass this magnitude is dropped: such nets only show saturation."""


@dataclass(frozen=True)
class Step:
    """``apply`` on the values at ``inputs``. One that changes its input in place makes no new value."""

    inputs: tuple[int, ...]
    apply: Callable[..., Any]
    in_place: bool


class Net(nn.Module):
    """Runs its steps in order, and returns the values at ``outputs``: one tensor, or a tuple."""

    def __init__(self, parts: Mapping[str, nn.Module | nn.Parameter], steps: Sequence[Step], outputs: Sequence[int]):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.steps, self.outputs = tuple(steps), tuple(outputs)

    def forward(self, a: Tensor, b: Tensor | None = None, ids: Tensor | None = None) -> Any:
        values: list[Any] = [x for x in (a, b, ids) if x is not None]
        for step in self.steps:
            made = step.apply(self, *(values[i] for i in step.inputs))
            if not step.in_place:
                values.append(made)
        results = tuple(values[i] for i in self.outputs)
        return results[0] if len(results) == 1 else results


@dataclass(frozen=True)
class RandomNet:
    """A net with a QConfig for each of its ops, and the shapes of its inputs without the batch; ``ids`` of one below
    ``vocabulary``.
    """

    seed: int
    model: Net
    shapes: tuple[tuple[int, ...], ...]
    vocabulary: int
    qconfigs: Mapping[str, Any]
    multiplier_bits: int

    @property
    def ops(self) -> int:
        """Number of steps that the outputs depend on, each a call or more of the model's source."""
        return len(_read(self.model.steps, self.model.outputs, len(self.shapes) + bool(self.vocabulary)))

    @property
    def branches(self) -> int:
        """Number of values that several steps read."""
        readers = Counter(i for step in self.model.steps for i in set(step.inputs))
        return sum(count > 1 for count in readers.values())

    def shared(self) -> int:
        """Number of modules that are called more than once."""
        calls: Counter[str] = Counter()
        hooks = [
            part.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))  # type: ignore[misc]
            for name, part in self.model.named_children()
        ]
        self.model(*self.batch(2, 0))
        for hook in hooks:
            hook.remove()
        return sum(count > 1 for count in calls.values())

    def batch(self, size: int, seed: int, reach: float = 1.0) -> tuple[Tensor, ...]:
        """Random inputs: reals of standard deviation ``reach``, ids."""
        return random_inputs(self.shapes, self.vocabulary, size, seed, reach)


def random_inputs(
    shapes: Sequence[tuple[int, ...]], vocabulary: int, size: int, seed: int, reach: float = 1.0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, *shape, generator=generator) * reach for shape in shapes]
    if vocabulary:
        inputs.append(torch.randint(0, vocabulary, (size, 4), generator=generator))
    return tuple(inputs)


def random_net(seed: int, least: int = 10, most: int = 40) -> RandomNet:
    """The net of ``seed``, of ``least`` to ``most`` steps that its outputs depend on; a step may be several ops."""
    draw = Draw(random.Random(seed))
    torch.manual_seed(seed)
    shapes, vocabulary = _input_shapes(draw)
    examples = random_inputs(shapes, vocabulary, 2, seed)
    values: list[Tensor] = [x.clone() for x in examples]
    parts: dict[str, nn.Module | nn.Parameter] = {}
    steps: list[Step] = []
    viewed: set[int] = set(range(len(values)))
    goal = draw.between(least, most)
    while len(steps) < goal:
        grown = _grow(draw, values, parts, viewed)
        if grown is not None:
            steps.append(grown)
    outputs = _outputs(draw, values, steps, len(examples), least)
    model = Net(parts, steps, outputs).eval()
    bits = draw.pick(20, 20, draw.between(8, 21))
    return RandomNet(seed, model, shapes, vocabulary, _qconfigs(draw, model, examples), bits)


def _input_shapes(draw: Draw) -> tuple[tuple[tuple[int, ...], ...], int]:
    side = draw.pick(6, 8, 9)
    shapes: list[tuple[int, ...]] = [draw.pick((3, side, side), (3, side, side), (5, 8))]
    if draw.chance(0.4):
        shapes.append(draw.pick(shapes[0], (8,), (4, side, side)))
    return tuple(shapes), draw.pick(0, 11) if len(shapes) == 2 else 0


def _grow(
    draw: Draw, values: list[Tensor], parts: dict[str, nn.Module | nn.Parameter], viewed: set[int]
) -> Step | None:
    """Try one step: append its value and parts, or leave everything as it is."""
    name = draw.pick(*STEPS)
    picked = Picked(draw, values, dict(parts))
    made: Made | None = STEPS[name](picked)
    if made is None or (made.in_place and made.inputs[0] in viewed):
        return None
    stand_in = nn.Module()
    for key, part in picked.parts.items():
        if isinstance(part, nn.Module) and key not in parts:
            lively(part, len(parts)).eval()
        setattr(stand_in, key, part)
    with torch.no_grad():
        arguments = [values[i].clone() for i in made.inputs]
        result = made.apply(stand_in, *arguments)
        if not isinstance(result, Tensor) or not _moderate(result):
            return None
        if not _same(result, made.apply(stand_in, *(_shaken(values[i]) for i in made.inputs))):
            return None
    parts.update(picked.parts)
    if made.in_place:
        values[made.inputs[0]] = result
    else:
        values.append(result)
        viewed.update(made.inputs if made.view else ())
        if made.view:
            viewed.add(len(values) - 1)
    return Step(made.inputs, made.apply, made.in_place)


def _shaken(x: Tensor) -> Tensor:
    """``x`` with other last bits."""
    if not x.is_floating_point():
        return x.clone()
    return x + x.abs().amax() * 1e-5 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


def _same(x: Tensor, other: Tensor) -> bool:
    """Whether the last bits of its inputs do not decide a result, as they do order equal numbers, or scale up a row of
    them to variance 1.
    """
    if not x.is_floating_point():
        return torch.equal(x, other)
    return float((x - other).abs().max()) <= 1e-3 * float(x.abs().max())


def _moderate(x: Tensor) -> bool:
    real = x.float()
    return x.numel() <= 2 * 4096 and bool(torch.isfinite(real).all()) and float(real.abs().max()) <= LARGEST


def _outputs(draw: Draw, values: Sequence[Tensor], steps: Sequence[Step], inputs: int, least: int) -> list[int]:
    """The last value and some that no step reads, so many that ``least`` steps count; integers and truth values too."""
    read = {i for step in steps for i in step.inputs}
    unread = [i for i in range(inputs, len(values)) if i not in read]
    outputs = {len(values) - 1, *draw.some(unread, 4)}
    for i in reversed(unread):
        if len(_read(steps, outputs, inputs)) >= least:
            break
        outputs.add(i)
    return sorted(outputs)


def _read(steps: Sequence[Step], outputs: Iterable[int], inputs: int) -> list[Step]:
    """The steps that the values at ``outputs`` depend on, the last first."""
    made = inputs + sum(not step.in_place for step in steps)
    needed, found = set(outputs), []
    for step in reversed(steps):
        made -= not step.in_place
        if (step.inputs[0] if step.in_place else made) in needed:
            needed.update(step.inputs)
            found.append(step)
    return found


def _qconfigs(draw: Draw, model: Net, examples: tuple[Tensor, ...]) -> dict[str, Any]:
    """A default format and other formats for about a quarter of the ops, by name; int16 for what makes a grid."""
    nodes = {node.name: node for node in fuse_fx(model, tuple(x.clone() for x in examples)).nodes}
    free = [node.name for node in nodes.values() if node.op != INPUT and node.format is None]
    default = _qconfig(draw.pick("int8", "int8", "int16"))
    overrides = {name: _qconfig(draw.pick("int8", "int16")) for name in free if draw.chance(0.25)}
    for node in nodes.values():
        if node.op == "grid_sample":
            grid = nodes[node.inputs[1]]
            while BY_NAME[grid.op].keeps_scale:
                grid = nodes[grid.inputs[0]]
            overrides[grid.name] = _qconfig("int16")
    return {"": default, "module_name": overrides}


def _qconfig(dtype: Any) -> QConfig:
    return QConfig(activation=FakeQuantSpec(dtype=dtype))
