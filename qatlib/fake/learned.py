"""Scales that are trained: LSQ, PACT and TQT, each a parameter, the scale that it means, and its gradient.

Below, ``v = x / s`` and ``q = clamp(rne(v), qmin, qmax)``; the result is ``q * s`` for each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.fake.straight_through import gate, gate_bounds, pieces, round_into
from qatlib.ops.clamp import Bounds
from qatlib.qtype import DEAD_SCALE, limits

UNSET = -(2.0**15)
"""What a learned parameter holds before QAT starts; no rule has a legal value this low."""
_LARGEST_LOG2 = 100.0


class Rule(ABC):
    """One way to learn a scale. ``dtype`` is that of the codes; parameters and scales are float32 of one shape."""

    @abstractmethod
    def initial(self, scale: Tensor, dtype: str) -> Tensor:
        """The parameter that means ``scale``."""

    @abstractmethod
    def scale(self, learned: Tensor, dtype: str) -> Tensor:
        """The scale that the parameter means, at least ``DEAD_SCALE``."""

    @abstractmethod
    def legal(self, learned: Tensor, dtype: str) -> Tensor:
        """The nearest parameter that means a legal scale: a step may have gone past it."""

    def times(self, learned: Tensor, factor: Tensor) -> Tensor:
        """The parameter where what is quantized is multiplied by ``factor`` > 0."""
        return learned * factor

    @abstractmethod
    def inside(self, v: Tensor, rounded: Tensor, dtype: str) -> tuple[Tensor, float, float]:
        """Of what, and between which two numbers, both excluded, the gradient passes to x."""

    def slope(self, upstream: Tensor, passed: Tensor, v: Tensor, codes: Tensor) -> Tensor:
        """``upstream * d(q s)/ds`` with the rounding passed through: ``q - v`` inside, ``q`` outside."""
        return (upstream * codes).addcmul_(passed, v, value=-1)

    @abstractmethod
    def factor(self, scale: Tensor, count: int, dtype: str) -> Tensor | float:
        """What multiplies the sum of :meth:`slope` over ``count`` elements."""

    def of_part(self, share: float) -> float:
        """What brings :meth:`factor` of a ``share`` of the elements to that of all of them."""
        return 1.0


class Lsq(Rule):
    """The scale itself: Esser et al., 2020, equations 3 and 5, gradients divided by ``sqrt(count * qmax)``."""

    def initial(self, scale: Tensor, dtype: str) -> Tensor:
        return scale.clone()

    def scale(self, learned: Tensor, dtype: str) -> Tensor:
        return self.legal(learned, dtype)

    def legal(self, learned: Tensor, dtype: str) -> Tensor:
        return learned.clamp(min=DEAD_SCALE)

    def inside(self, v: Tensor, rounded: Tensor, dtype: str) -> tuple[Tensor, float, float]:
        qmin, qmax = limits(dtype)
        return v, float(qmin), float(qmax)

    def factor(self, scale: Tensor, count: int, dtype: str) -> Tensor | float:
        return 1.0 / math.sqrt(max(1, count) * limits(dtype)[1])

    def of_part(self, share: float) -> float:
        return math.sqrt(share)


class Pact(Rule):
    """The clip ``alpha = s (qmax - qmin) / 2``: Choi et al., 2018, for codes of both signs.

    Its gradient is the upstream gradient of what is clipped, with the sign of x.
    """

    def initial(self, scale: Tensor, dtype: str) -> Tensor:
        return scale * _half(dtype)

    def scale(self, learned: Tensor, dtype: str) -> Tensor:
        return self.legal(learned, dtype) / _half(dtype)

    def legal(self, learned: Tensor, dtype: str) -> Tensor:
        return learned.clamp(min=DEAD_SCALE * _half(dtype))

    def inside(self, v: Tensor, rounded: Tensor, dtype: str) -> tuple[Tensor, float, float]:
        return v, -_half(dtype), _half(dtype)

    def slope(self, upstream: Tensor, passed: Tensor, v: Tensor, codes: Tensor) -> Tensor:
        return (upstream - passed).mul_(v.sign())

    def factor(self, scale: Tensor, count: int, dtype: str) -> Tensor | float:
        return 1.0


class Tqt(Rule):
    """``log2 t`` of a threshold t; the scale is the power of two ``2^ceil(log2 t) / 2^(b-1)``, b the bits of the dtype.

    Jain et al., 2019, equations 6 to 8: the gradient is that of the scale times ``s ln 2``.
    """

    def initial(self, scale: Tensor, dtype: str) -> Tensor:
        return scale.log2() + _bits(dtype)

    def scale(self, learned: Tensor, dtype: str) -> Tensor:
        return torch.exp2((self.legal(learned, dtype) - _bits(dtype)).ceil())

    def times(self, learned: Tensor, factor: Tensor) -> Tensor:
        return learned + factor.log2()

    def legal(self, learned: Tensor, dtype: str) -> Tensor:
        return learned.clamp(math.log2(DEAD_SCALE) + _bits(dtype), _LARGEST_LOG2)

    def inside(self, v: Tensor, rounded: Tensor, dtype: str) -> tuple[Tensor, float, float]:
        qmin, qmax = limits(dtype)
        return rounded, qmin - 0.5, qmax + 0.5

    def factor(self, scale: Tensor, count: int, dtype: str) -> Tensor | float:
        return scale * math.log(2.0)


def _half(dtype: str) -> float:
    qmin, qmax = limits(dtype)
    return (qmax - qmin) / 2


def _bits(dtype: str) -> int:
    return limits(dtype)[1].bit_length()


RULES: dict[str, Rule] = {"lsq": Lsq(), "pact": Pact(), "tqt": Tqt()}
LEARNED = ("learned", "learned_by")
"""What a module that learns its scale has in a state dict: the parameter, and the place of its rule in ``RULES``."""


class LearnedScale(nn.Module):
    """A fake-quant module whose scale is trained if its ``spec`` says so and fixes none.

    The parameter ``learned`` is set from the scale that calibration gave when QAT starts, and not before: until then
    nothing distinguishes the module from one that learns nothing, and checkpoints of either go into the other.
    """

    learned: nn.Parameter
    learned_by: Tensor
    learned_goes_to = "scale"
    """Buffer that keeps a scale which the checkpoint of another kind learned."""

    def __init__(self, spec: FakeQuantSpec, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.rule = RULES.get(spec.kind) if spec.scale is None else None
        self.started = False
        if self.rule is not None:
            self.learned = nn.Parameter(torch.full(shape, UNSET))
            self.register_buffer("learned_by", torch.tensor(list(RULES).index(spec.kind), dtype=torch.uint8))

    def start(self, scale: Tensor) -> None:
        """Learn from ``scale`` on, unless that has begun."""
        if self.rule is not None and not self.started:
            with torch.no_grad():
                self.learned.copy_(self.rule.initial(scale, self.spec.dtype))
            self.started = True

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Follow values that were multiplied by ``factor`` > 0, if a scale of them is learned."""
        if self.started and self.rule is not None:
            self.learned.copy_(self.rule.times(self.learned, factor.to(self.learned)))

    def restart(self) -> None:
        """Forget what was learned."""
        self.started = False
        if self.rule is not None:
            nn.init.constant_(self.learned, UNSET)

    @torch.no_grad()
    def current(self) -> Tensor:
        """The learned scale; a parameter that a step moved out of the legal range is put back."""
        assert self.rule is not None
        self.learned.copy_(self.rule.legal(self.learned, self.spec.dtype))
        return self.rule.scale(self.learned, self.spec.dtype)

    def quantize(self, x: Tensor, learned: Tensor, scale: Tensor, bounds: Bounds | None = None) -> Tensor:
        """As :func:`qatlib.fake.fake_quant.fake_quantize`, differentiable in ``learned``, whose ``scale`` this is."""
        out: Tensor = _Learned.apply(x, learned, scale, self.rule, self.spec.dtype, bounds)  # type: ignore[no-untyped-call]
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.started = self.rule is not None and bool((self.learned > UNSET).all())

    def _translate(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Make the entries of a checkpoint of another kind this one's: the scale that it learned is a start here."""
        learned, by = (prefix + name for name in LEARNED)
        if by in state_dict and (rule := list(RULES.values())[int(state_dict[by])]) is not self.rule:
            del state_dict[by]
            parameter = state_dict.pop(learned).detach()
            if bool((parameter > UNSET).all()):
                state_dict[prefix + self.learned_goes_to] = rule.scale(parameter, self.spec.dtype)
        if self.rule is not None and not {learned, by} & state_dict.keys():
            state_dict |= {learned: torch.full_like(self.learned, UNSET), by: self.learned_by}


def is_optional(name: str) -> bool:
    """Whether an entry of a state dict depends on how scales are learned: a model of another kind may lack it."""
    return name.rpartition(".")[2] in LEARNED or name.endswith("weight_fake_quant.fixed")


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned parameters of all fake-quant modules."""
    return [m.learned for m in model.modules() if isinstance(m, LearnedScale) and m.rule is not None]


def count_all_rows(model: nn.Module, share: float) -> None:
    """Give scales of activations the gradient of a process that sees all rows, where this sees a ``share`` of them."""
    for part in model.modules():
        if isinstance(part, LearnedScale) and part.rule is not None and part.learned.dim() == 0:
            gradient = part.learned.grad
            if gradient is not None:
                gradient.mul_(part.rule.of_part(share))


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, learned: Tensor, scale: Tensor, rule: Rule, dtype: str, bounds: Bounds | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale, ctx.shape, ctx.rule, ctx.dtype, ctx.bounds = scale.clone(), learned.shape, rule, dtype, bounds
        return round_into(torch.empty_like(x, dtype=torch.result_type(x, scale)), x, scale, limits(dtype), bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rule, dtype, bounds = ctx.rule, ctx.dtype, ctx.bounds
        passed, sums = torch.empty_like(x, dtype=grads[0].dtype), []
        for source, upstream, target, unit in pieces(x, grads[0], passed, scale=ctx.scale):
            v = torch.div(source if bounds is None else source.clamp(*bounds), unit)
            rounded = v.round()
            gate(upstream, *rule.inside(v, rounded, dtype), grad_input=target)
            slope = rule.slope(upstream, target, v, rounded.clamp_(*limits(dtype)))
            sums.append(slope.sum() if ctx.scale.numel() == 1 else slope.flatten(1).sum(1))
            if bounds is not None:
                gate(target, source, *gate_bounds(bounds, x.dtype), grad_input=target)
        total = torch.stack(sums).sum() if ctx.scale.numel() == 1 else torch.cat(sums)
        factor = rule.factor(ctx.scale.reshape(ctx.shape), x.numel(), dtype)
        return passed, (total.reshape(ctx.shape) * factor).float(), None, None, None, None
