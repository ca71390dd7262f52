"""FakeOp: one node of a graph as a module that computes in float and quantizes its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.fake.batch_norm import KeptBatchNorm, fold
from qatlib.fake.distributed import largest
from qatlib.fake.fake_quant import (
    ConstantFakeQuantize,
    FakeQuantize,
    WeightFakeQuantize,
    fake_quantize,
    round_to,
    within_reach,
)
from qatlib.fake.qconfig import QConfig
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.graph.ir import CONSTANT, OPAQUE, Node
from qatlib.ops.base import BY_NAME, Attrs
from qatlib.ops.clamp import apply_clamp
from qatlib.ops.dense import Dense
from qatlib.ops.masks import floor_of_sum
from qatlib.qtype import limits

UNSEEN = torch.finfo(torch.float32).min
"""What stands for no value in a buffer that has to be finite."""


class FakeOp(nn.Module):
    """One node. ``activation_post_process`` quantizes its output, ``weight_fake_quant`` its weights; either may be
    None.

    A hybrid op has neither and stays float. ``preserve_qat_mode`` keeps the op in this form after conversion.
    """

    largest_sum: Tensor
    """Of weights of 16 bits: the largest magnitude of every channel's sum that calibration saw."""
    largest_other: Tensor
    """Of a sum with masks, for every input: the largest value of the other one that was seen beside it."""

    def __init__(
        self,
        node: Node,
        qconfig: QConfig | None,
        quantizes_output: bool,
        cell: StateCell,
        shared: dict[int, nn.Parameter],
        modules: dict[int, nn.Module],
    ) -> None:
        super().__init__()
        self.node, self.qconfig = node, qconfig
        self.preserve_qat_mode = False
        self._cell = cell
        for role, tensor in node.params.items():
            if id(tensor) not in shared:
                trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
                shared[id(tensor)] = nn.Parameter(tensor.detach().clone(), requires_grad=trainable)
            self.register_parameter(role, shared[id(tensor)])
        if isinstance(node.callee, nn.Module):
            modules.setdefault(id(node.callee), copy.deepcopy(node.callee))
            self.callee: Callable[..., Any] | None = modules[id(node.callee)]
        else:
            self.callee = node.callee
        self.held: dict[str, Tensor] | None = None
        """What :meth:`quantized_params` gave first while :meth:`.FakeQuantModel.held_parameters` lasts; else None."""
        self._unclamped: Attrs | None = None  # of an op whose clamp its fake-quant does along with the rounding
        if node.op in BY_NAME and BY_NAME[node.op].takes_clamp:
            self._unclamped = {key: value for key, value in node.attrs.items() if key != "clamp"}
        weighted = qconfig is not None and "weight" in node.params
        self.kept_batch_norm: KeptBatchNorm | None = None
        self.weight_fake_quant: WeightFakeQuantize | None = None
        if qconfig and weighted:
            self.weight_fake_quant = WeightFakeQuantize(qconfig.weight, len(node.params["weight"]))
        self._sees_sums = self.weight_fake_quant is not None and self.weight_fake_quant.spec.dtype == "int16"
        if self._sees_sums:
            self.register_buffer("largest_sum", torch.zeros(len(node.params["weight"])))
        self._input_quantizer: tuple[FakeQuantize, ...] = ()
        self._masked_inputs: list[tuple[int, FakeQuantize, float]] = []
        self._sees_addends = node.op in ("add", "sub") and bool(node.attrs.get("masked_inputs"))
        if self._sees_addends:
            self.register_buffer("largest_other", torch.full((2,), UNSEEN))
        self._input_range: Callable[[], tuple[float, float] | None] = lambda: None
        spec = qconfig.activation if qconfig and quantizes_output else None
        self.activation_post_process: FakeQuantize | None = None
        below = node.attrs.get("below_maximum")
        if spec and node.op == CONSTANT:
            self.activation_post_process = ConstantFakeQuantize(spec, cell, node.name, node.params["value"], below)
        elif spec:
            self.activation_post_process = FakeQuantize(spec, cell, node.name, below)

    @property
    def hybrid(self) -> bool:
        """Whether the op stays float."""
        return self.qconfig is None

    def compute(self, *inputs: Tensor) -> Tensor:
        """The op before its output is quantized."""
        return self._compute(self.node.attrs, *inputs)

    def _compute(self, attrs: Attrs, *inputs: Tensor) -> Tensor:
        if self.node.op == OPAQUE:
            assert self.callee is not None
            result: Tensor = self.callee(*inputs)
            return result
        if self._normalizes:
            return self._normalized(attrs, inputs)
        params = self.quantized_params() if self._cell.state.quantizes else self.float_params()
        operator = BY_NAME[self.node.op]
        if self._input_quantizer and self._cell.state.quantizes and operator.has_poles(attrs):
            return within_reach(
                lambda x: operator.forward(attrs, params, x),
                inputs[0],
                self._input_range(),
                self._input_quantizer[0].scale,
            )
        return operator.forward(attrs, params, *inputs)

    @property
    def _normalizes(self) -> bool:
        """Whether a kept batch norm takes its statistics from the batch."""
        norm = self.kept_batch_norm
        return norm is not None and self.training and not norm.frozen and self._cell.state is FakeQuantState.QAT

    def _normalized(self, attrs: Attrs, inputs: tuple[Tensor, ...]) -> Tensor:
        norm, operator = self.kept_batch_norm, BY_NAME[self.node.op]
        assert norm is not None
        assert isinstance(operator, Dense)
        weight = self.quantized_params()["weight"]
        out = norm.normalized(operator.float_product(attrs, inputs[0], weight, None), self.get_parameter("bias"))
        if len(inputs) == 2:
            out = out + inputs[1]
        return apply_clamp(out, attrs.get("clamp"))

    def float_params(self) -> dict[str, Tensor]:
        """Parameters as trained, with a kept batch norm folded into them."""
        params = {role: getattr(self, role) for role in self.node.params}
        if (norm := self.kept_batch_norm) is None:
            return params
        factor = norm.factor()
        # Of a batch's statistics the gradient reaches the scale by the normalization, where f cancels.
        return fold(norm, params["weight"], params["bias"], factor.detach() if self._normalizes else factor)

    def quantized_params(self) -> dict[str, Tensor]:
        """Weights rounded to their codes, the bias to the accumulator's unit ``s_x * s_w[c]``, as integers will be."""
        if self.held is None:
            return self._quantized_params()
        if not self.held:
            self.held.update(self._quantized_params())
        return dict(self.held)

    def _quantized_params(self) -> dict[str, Tensor]:
        params, fake = self.float_params(), self.weight_fake_quant
        if fake is None:
            return params
        if self._cell.state is FakeQuantState.QAT:
            fake.start(fake.scales(params["weight"]))
        scales = self.weight_scales()
        params["weight"] = fake.quantized(params["weight"], scales)
        if self._input_quantizer:
            params["bias"] = round_to(params["bias"], scales * self._input_quantizer[0].scale)
        return params

    def weight_scales(self) -> Tensor:
        """Scale of every output channel, float32 ``[O]``: that of the weights, or the smallest at which the bias stays
        within 2^30 units of ``s_x * s_w[c]``, and under weights of 16 bits the sums that calibration saw.

        A channel of hardly any weight may have a large bias; 16 bits times 16 bits leave no bits for a sum.
        """
        assert self.weight_fake_quant is not None
        params = self.float_params()
        scales = self.weight_fake_quant.scales(params["weight"])
        if self._input_quantizer:
            unit = self._input_quantizer[0].scale.double() * 2**30
            needed = params["bias"].detach().abs()
            if self._sees_sums:
                needed = torch.maximum(needed, self.largest_sum)
            scales = torch.maximum(scales, (needed.double() / unit).float())
        return scales

    def forward(self, *inputs: Tensor) -> Tensor:
        fake = self.activation_post_process
        if fake is not None and self._unclamped is not None:
            sums = _in_float32(self._compute(self._unclamped, *inputs))
            self._observe(inputs, sums)
            quantized: Tensor = fake(sums, None, self.node.attrs.get("clamp"), _owns_memory(sums, inputs))
            return quantized
        out = _in_float32(self.compute(*inputs))
        self._observe(inputs, out)
        if fake is not None:
            out = fake(out, self._telling(inputs, out))
        elif self._input_quantizer and self._cell.state.quantizes and BY_NAME[self.node.op].rounds(self.node.attrs):
            out = fake_quantize(out, self._input_quantizer[0].scale, self._input_quantizer[0].spec.dtype)
        return out

    def start_learning(self) -> None:
        """Begin with learned scales where they are, as the first forward in QAT does."""
        if (weights := self.weight_fake_quant) is not None:
            weights.start(weights.scales(self.float_params()["weight"]))
        if (fake := self.activation_post_process) is not None:
            fake.start(fake.scale)
            fake.refresh()

    def forget(self) -> None:
        """Drop what earlier calibrations saw of sums and addends."""
        if self._sees_addends:
            self.largest_other.fill_(UNSEEN)
        if self._sees_sums:
            self.largest_sum.zero_()
        if isinstance(self.activation_post_process, ConstantFakeQuantize):
            self.activation_post_process.forget()

    def merge(self) -> None:
        """Take the largest of the sums, and of the room for masks, that any process saw."""
        fake = self.activation_post_process
        if isinstance(fake, ConstantFakeQuantize):
            fake.make_room(-float(largest(fake.room)))
        elif fake is not None:
            fake.room.copy_(largest(fake.room))
        if self._sees_sums:
            self.largest_sum.copy_(largest(self.largest_sum))
        if self._sees_addends:
            self.largest_other.copy_(largest(self.largest_other))

    def _observe(self, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Keep what scales depend on besides the values of the output."""
        if self._sees_sums and self._cell.state is FakeQuantState.CALIBRATION:
            self._see_sums(inputs, out)
        if self._masked_inputs and self._cell.state.observes:
            self._make_room(inputs, out)

    def _see_sums(self, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Keep the largest magnitude of every channel's sum, without what is fused behind it."""
        operator, node = BY_NAME[self.node.op], self.node
        if len(inputs) > 1 or "clamp" in node.attrs:
            bare = {key: value for key, value in node.attrs.items() if key != "clamp"}
            out = operator.forward(bare, self.float_params(), inputs[0])
        axis = operator.channel_axis % out.dim()  # type: ignore[attr-defined]
        sums = out.detach().abs().movedim(axis, 0).flatten(1)
        if sums.numel():
            self.largest_sum.copy_(torch.maximum(self.largest_sum, sums.amax(1)))

    def _make_room(self, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Let the masks among the addends reach so low that the sum is, too."""
        if not self._sees_addends:
            return
        alpha = float(self.node.attrs.get("alpha", 1))
        weights = 1.0, alpha if self.node.op == "add" else -alpha
        for i, quantizer, masks in self._masked_inputs:
            other = float((inputs[1 - i].detach() * weights[1 - i]).max())
            self.largest_other[i].clamp_(min=other)
            if bool((inputs[i] <= masks).any()):
                quantizer.make_room(floor_of_sum(out, self.node.attrs["below_maximum"]) - other)

    def _pass_room(self, low: float) -> None:
        """Let the masks among the inputs reach so low that the output reaches ``low``."""
        factor = self.node.attrs.get("masked_factor", 1.0)
        for i, quantizer, _ in self._masked_inputs:
            seen = self._sees_addends and float(self.largest_other[i]) > UNSEEN
            quantizer.make_room(low / factor - (float(self.largest_other[i]) if seen else 0.0))

    def _telling(self, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Of 1/x and the like, the values where x is not below half a code: there, the code is 0 and the value huge."""
        state, node = self._cell.state, self.node
        if not (self._input_quantizer and state.observes and BY_NAME[node.op].blows_up_at_zero(node.attrs)):
            return None
        _, qmax = limits(self._input_quantizer[0].spec.dtype)
        size = inputs[0].detach().abs()
        return out[size > size.amax() / (2 * qmax)]

    def extra_repr(self) -> str:
        fused = f" [+ {' + '.join(self.node.absorbed)}]" if self.node.absorbed else ""
        return f"{self.node.op}{fused}" + (", float" if self.hybrid else "")


def _owns_memory(x: Tensor, inputs: tuple[Tensor, ...]) -> bool:
    """Whether ``x`` is no view and shares no memory with ``inputs``."""
    if x._is_view():
        return False
    start = x.untyped_storage().data_ptr()
    return all(start != given.untyped_storage().data_ptr() for given in inputs)


def _in_float32(x: Tensor) -> Tensor:
    """Codes and scales need more than the bfloat16 of autocast."""
    return x.float() if x.dtype == torch.bfloat16 else x
