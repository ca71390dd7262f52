"""Batch norms kept through QAT: trained as such, with statistics of the batch, and folded wherever integers are made.

A layer with a folded batch norm has weights ``w' = f w`` and bias ``b' = b - f m``, where ``f = g / sqrt(v + eps)`` per
output channel; g and b are the scale and shift of the batch norm, m and v its running mean and variance. Kept, the
layer holds w and b, and computes in training (Krishnamoorthi, 2018, section 3.2.2)

    z = conv(x, quantized(f w)) / f;    y = g (z - mean(z)) / sqrt(var(z) + eps) + b

so that weights are rounded as the integers will have them, while each batch is normalized by its own statistics. In
evaluation, in the Program, and in training once frozen, it is the folded layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatlib.fake.distributed import size
from qatlib.graph.ir import Node
from qatlib.ops.batch_norm import affine

if TYPE_CHECKING:
    from qatlib.fake.model import FakeQuantModel
    from qatlib.fake.op import FakeOp

_MOMENTUM = 0.1


class KeptBatchNorm(nn.Module):
    """Scale and running statistics ``[O]`` of what a layer makes without its bias; the shift is the layer's bias."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: Node, bias: Tensor) -> None:
        """``bias`` ``[O]`` is what folding ``norm`` made, before anything trained or corrected it."""
        super().__init__()
        params = {role: tensor.detach().to(bias) for role, tensor in norm.params.items()}
        self.eps, self.frozen = float(norm.attrs["eps"]), False
        self.momentum = _MOMENTUM if norm.attrs["momentum"] is None else float(norm.attrs["momentum"])
        self.weight = nn.Parameter(params["weight"].clone(), requires_grad=norm.params["weight"].requires_grad)
        factor, offset = affine(norm.attrs, params)
        self.register_buffer("running_mean", params["mean"] - (bias.detach() - offset) / _divisor(factor))
        self.register_buffer("running_var", params["var"].clone())

    def factor(self) -> Tensor:
        """f, ``[O]``."""
        return self.weight * torch.rsqrt(self.running_var + self.eps)

    def normalized(self, z: Tensor, shift: Tensor) -> Tensor:
        """``z`` ``[N, O, ...]``, scaled by f still, normalized over the batch; the running statistics follow.

        Of several processes the batch is that of all. Raises ValueError for one value per channel.
        """
        z = z.float() / _over_channels(_divisor(self.factor().detach()), z)
        if size() > 1:
            return self._over_processes(z, shift)
        means = self.running_mean, self.running_var
        return F.batch_norm(z, *means, self.weight, shift, training=True, momentum=self.momentum, eps=self.eps)

    def _over_processes(self, z: Tensor, shift: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        axes = [0, *range(2, z.dim())]
        rows = z.new_tensor(z.numel() / z.shape[1])
        count = float(all_reduce(rows))  # type: ignore[no-untyped-call]
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count:g}")
        mean = all_reduce(z.sum(axes)) / count  # type: ignore[no-untyped-call]
        apart = z - _over_channels(mean, z)
        var = all_reduce(apart.square().sum(axes)) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return apart * _over_channels(self.weight * torch.rsqrt(var + self.eps), z) + _over_channels(shift, z)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, momentum={self.momentum:g}" + (", frozen" if self.frozen else "")


def keep_batch_norms(model: FakeQuantModel) -> tuple[str, ...]:
    """Take the batch norms of ``model`` out of the weights that they were folded into, to train them.

    The function stays as it is but for float32 rounding, whatever calibration did to weights and bias. To be called
    before the optimizer is built. A batch norm that stands alone is a depthwise convolution, and stays one. Returns the
    names of the ops.
    """
    kept: dict[int, KeptBatchNorm] = {}
    names = []
    for name, op in model.ops():
        norm = next((node for node in op.node.fused if node.op == "batch_norm"), None)
        if norm is None or op.kept_batch_norm is not None:
            continue
        weight, bias = op.get_parameter("weight"), op.get_parameter("bias")
        if id(weight) not in kept:
            batch_norm = kept[id(weight)] = KeptBatchNorm(norm, op.node.params["bias"].to(bias))
            factor = batch_norm.factor().detach()
            with torch.no_grad():
                weight.div_(_per_row(_divisor(factor), weight))
                bias.add_(batch_norm.running_mean * factor)
        op.kept_batch_norm = kept[id(weight)]
        names.append(name)
    return tuple(names)


def fold_batch_norms(model: FakeQuantModel) -> None:
    """Undo :func:`keep_batch_norms`, with what was trained since."""
    done: set[int] = set()
    for op in _kept(model):
        weight, bias = op.get_parameter("weight"), op.get_parameter("bias")
        if id(weight) not in done:
            done.add(id(weight))
            folded = {role: tensor.detach() for role, tensor in op.float_params().items()}
            with torch.no_grad():
                weight.copy_(folded["weight"])
                bias.copy_(folded["bias"])
    for op in _kept(model):
        op.kept_batch_norm = None


def freeze_batch_norms(model: FakeQuantModel, frozen: bool = True) -> None:
    """Keep the running statistics as they are, and train with them; scale and shift are trained on."""
    for op in _kept(model):
        assert op.kept_batch_norm is not None
        op.kept_batch_norm.frozen = frozen


def _kept(model: FakeQuantModel) -> list[FakeOp]:
    return [op for _, op in model.ops() if op.kept_batch_norm is not None]


def fold(norm: KeptBatchNorm, weight: Tensor, bias: Tensor, factor: Tensor) -> dict[str, Tensor]:
    """Weight and bias of the folded layer."""
    return {"weight": weight * _per_row(factor, weight), "bias": bias - norm.running_mean * factor}


def _divisor(factor: Tensor) -> Tensor:
    """Where a scale of 0 silences a channel, its weights are 0 and stay so."""
    return torch.where(factor == 0, 1.0, factor)


def _per_row(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (weight.dim() - 1))


def _over_channels(vector: Tensor, z: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (z.dim() - 2))
