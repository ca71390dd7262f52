"""Attention and the transformer layers of torch, as steps: the composites of ``docs/numerics.md``.

The steps of a layer are named as its submodules are (``encoder.layers.0.self_attn.q``), so that a qconfig by name
reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Call, Ref
from qatlib.ops.composite import INT16, Composite, inner, under
from qatlib.ops.matmul import permuted, reshaped, weights
from qatlib.ops.softmax import softmax

HIDDEN = -1e4
"""Score of what a mask hides; constant real masks hide where they are this low or lower."""


# -- scores ------------------------------------------------------------------------------------------------------------


def _swapped(call: Call, x: Ref, i: int, j: int, suffix: str) -> Ref:
    """x with two axes exchanged."""
    axes = [str(axis) for axis in range(len(x.shape))]
    order = list(axes)
    order[i], order[j] = order[j], order[i]
    return permuted(call, x, axes, order, suffix)


def _hide(call: Call, scores: Ref, mask: Any, where: bool) -> Ref:
    """Scores with :data:`HIDDEN` at the elements of a boolean mask that are ``where``."""
    branches = {"true": HIDDEN if where else None, "false": None if where else HIDDEN}
    return call.emit("where", [call.ref(mask), scores], branches, suffix=".masked", format=INT16)


def _masked(call: Call, scores: Ref, mask: Any, true_hides: bool) -> Ref:
    """Scores after one mask: truth values, or real numbers that are added."""
    if mask is None:
        return scores
    if isinstance(mask, Ref):
        if mask.content == "bool":
            return _hide(call, scores, mask, true_hides)
        if mask.content == "int":
            raise call.refuse("an attention mask of integers", "Use a boolean mask: mask != 0")
        return call.emit("add", [scores, mask], suffix=".bias", format=INT16)
    if mask.dtype == torch.bool:
        return _hide(call, scores, mask, true_hides)
    hidden = mask <= HIDDEN
    if bool((mask[~hidden] != 0).any()):
        bias = mask if not bool(hidden.any()) else call.derive(mask, "kept", lambda m: m.masked_fill(hidden, 0.0))
        scores = call.emit("add", [scores, call.ref(bias)], suffix=".bias", format=INT16)
    return _hide(call, scores, hidden, True) if bool(hidden.any()) else scores


def attention(
    call: Call, q: Ref, k: Ref, v: Ref, scale: float, mask: Callable[[Ref], Ref], out: str
) -> tuple[Ref, Ref]:
    """``softmax(mask(scale * q k^T)) v`` over the last two axes; the result, in step ``out``, and the softmax."""
    scores = call.emit("matmul", [q, _swapped(call, k, -2, -1, ".k_t")], {"factor": scale}, suffix=".qk", format=INT16)
    probabilities = softmax(under(call, ".softmax"), mask(scores), len(scores.shape) - 1)
    return call.emit("matmul", [probabilities, v], suffix=out), probabilities


class ScaledDotProduct(Composite):
    name = "scaled_dot_product_attention"
    functions = (F.scaled_dot_product_attention,)

    def trace(self, call: Call) -> Ref:
        found = call.bind(
            "query", "key", "value", "attn_mask", "dropout_p", "is_causal",
            attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        )  # fmt: skip
        q, k, v = (call.ref(found[name]) for name in ("query", "key", "value"))
        if found["dropout_p"]:
            raise call.refuse("dropout that stays on at inference", "Pass dropout_p=p if self.training else 0.0")
        if found["enable_gqa"] and q.shape[-3] != k.shape[-3]:
            raise call.refuse("groups of queries share keys", "Repeat keys and values: k.repeat_interleave(n, dim=1)")
        if min(len(x.shape) for x in (q, k, v)) < 2 or min(q.shape[-1], k.shape[-2]) < 0:
            raise call.refuse("attends over the batch", "Put the batch before [length, channels]")
        scale = found["scale"] if found["scale"] is not None else 1 / math.sqrt(q.shape[-1])
        if not isinstance(scale, int | float) or scale <= 0:
            raise call.refuse(f"scale is {scale}", "Use a positive number")
        mask = found["attn_mask"]
        if found["is_causal"]:
            if q.shape[-2] < 0:
                raise call.refuse("attends over the batch", "Put the batch before [length, channels]")
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return attention(call, q, k, v, float(scale), lambda s: _masked(call, s, mask, False), ".out")[0]


class MultiheadAttention(Composite):
    """Returns (output, weights or None) as torch does."""

    name = "multi_head_attention"
    modules = (nn.MultiheadAttention,)

    def trace(self, call: Call) -> tuple[Ref, Ref | None]:
        module = call.module
        assert isinstance(module, nn.MultiheadAttention)
        found = call.bind(
            "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
            key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        )  # fmt: skip
        if module.bias_k is not None or module.add_zero_attn:
            raise call.refuse("add_bias_kv or add_zero_attn", "Leave them off")
        sides = [call.ref(found[name]) for name in ("query", "key", "value")]
        if any(len(x.shape) != 3 for x in sides):
            raise call.refuse(f"a query of {len(sides[0].shape)} axes", "Give query, key and value a batch axis")
        heads = [self._projected(call, module, x, i) for i, x in enumerate(sides)]
        scale = 1 / math.sqrt(module.head_dim)
        padding, mask = self._padding(call, found["key_padding_mask"]), self._per_head(call, module, found["attn_mask"])

        def hide(scores: Ref) -> Ref:
            return _masked(call, _masked(call, scores, mask, True), padding, True)

        out, probabilities = attention(call, heads[0], heads[1], heads[2], scale, hide, ".heads")
        order = ("n", "l", "h", "d") if module.batch_first else ("l", "n", "h", "d")
        out = permuted(call, out, ("n", "h", "l", "d"), order, ".heads")
        out = reshaped(call, out, (*out.shape[:2], module.embed_dim), ".heads.reshape")
        proj = module.out_proj
        out = call.emit("linear", [out], {}, weights(proj.weight, proj.bias), suffix=".out")
        if not found["need_weights"]:
            return out, None
        if not found["average_attn_weights"]:
            return out, probabilities
        mean = {"axes": [1], "keepdim": False, "divisor": module.num_heads}
        return out, call.emit("sum", [probabilities], mean, suffix=".weights")

    @staticmethod
    def _projected(call: Call, module: nn.MultiheadAttention, x: Ref, index: int) -> Ref:
        """Query, key or value (index 0, 1, 2) as ``[N, heads, length, d]``."""
        name, size = "qkv"[index], module.embed_dim

        def rows(w: Tensor) -> Tensor:
            return w[index * size : (index + 1) * size]

        weight: Tensor | None = module.in_proj_weight
        bias: Tensor | None = module.in_proj_bias
        if weight is not None:
            weight = call.derive(weight, f"rows of {name}", rows)
        else:
            weight = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[index]
        bias = None if bias is None else call.derive(bias, f"rows of {name}", rows)
        y = call.emit("linear", [x], {}, weights(weight, bias), suffix=f".{name}")
        y = reshaped(call, y, (*y.shape[:2], module.num_heads, module.head_dim), f".{name}.reshape")
        order = ("n", "l", "h", "d") if module.batch_first else ("l", "n", "h", "d")
        return permuted(call, y, order, ("n", "h", "l", "d"), f".{name}")

    @staticmethod
    def _padding(call: Call, mask: Any) -> Any:
        """``[N, S]`` for scores ``[N, heads, L, S]``."""
        if mask is None:
            return None
        shape = (mask.shape[0], 1, 1, mask.shape[1])
        return reshaped(call, mask, shape, ".padding") if isinstance(mask, Ref) else mask.view(shape)

    @staticmethod
    def _per_head(call: Call, module: nn.MultiheadAttention, mask: Any) -> Any:
        """``[L, S]`` as it is; ``[N * heads, L, S]`` with an axis for the heads."""
        if mask is None or len(mask.shape) == 2:
            return mask
        if not isinstance(mask, Ref) or mask.shape[0] != -module.num_heads:
            raise call.refuse(f"an attention mask of shape {list(mask.shape)}", "Use [length, length]")
        return reshaped(call, mask, (-1, module.num_heads, *mask.shape[1:]), ".mask")


# -- transformer layers ------------------------------------------------------------------------------------------------


def _attended(call: Call, name: str, module: Any, x: Any, memory: Any, mask: Any, padding: Any) -> Ref:
    out: Ref = inner(
        call, f".{name}", module, x, memory, memory, key_padding_mask=padding, attn_mask=mask, need_weights=False
    )[0]
    return out


def _blocks(call: Call, layer: Any, x: Ref, blocks: list[Callable[[Ref], Ref]]) -> Ref:
    """Residual blocks, each with a norm before it or after the sum."""
    for i, block in enumerate(blocks, start=1):
        norm = getattr(layer, f"norm{i}")
        if layer.norm_first:
            x = call.emit("add", [x, block(inner(call, f".norm{i}", norm, x))], suffix=f".add{i}")
        else:
            x = inner(call, f".norm{i}", norm, call.emit("add", [x, block(x)], suffix=f".add{i}"))
    return x


def _feed_forward(call: Call, layer: Any, x: Ref) -> Ref:
    hidden = inner(call, ".linear1", layer.linear1, x)
    out: Ref = inner(call, ".linear2", layer.linear2, inner(call, ".activation", layer.activation, hidden))
    return out


class EncoderLayer(Composite):
    name = "transformer_encoder_layer"
    modules = (nn.TransformerEncoderLayer,)

    def trace(self, call: Call) -> Ref:
        layer: Any = call.module
        found = call.bind("src", "src_mask", "src_key_padding_mask", src_mask=None, src_key_padding_mask=None)
        mask, padding = found["src_mask"], found["src_key_padding_mask"]
        blocks: list[Callable[[Ref], Ref]] = [
            lambda x: _attended(call, "self_attn", layer.self_attn, x, x, mask, padding),
            lambda x: _feed_forward(call, layer, x),
        ]
        return _blocks(call, layer, call.ref(found["src"]), blocks)


class DecoderLayer(Composite):
    name = "transformer_decoder_layer"
    modules = (nn.TransformerDecoderLayer,)

    def trace(self, call: Call) -> Ref:
        layer: Any = call.module
        names = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
        found = call.bind("tgt", "memory", *names, **dict.fromkeys(names))
        memory = call.ref(found["memory"])
        own, other = ((found[f"{side}_mask"], found[f"{side}_key_padding_mask"]) for side in ("tgt", "memory"))
        blocks: list[Callable[[Ref], Ref]] = [
            lambda x: _attended(call, "self_attn", layer.self_attn, x, x, *own),
            lambda x: _attended(call, "multihead_attn", layer.multihead_attn, x, memory, *other),
            lambda x: _feed_forward(call, layer, x),
        ]
        return _blocks(call, layer, call.ref(found["tgt"]), blocks)


def _stacked(call: Call, stack: Any, x: Any, *args: Any, **kwargs: Any) -> Ref:
    """The layers of an encoder or decoder one after the other, then its norm."""
    for i, layer in enumerate(stack.layers):
        x = inner(call, f".layers.{i}", layer, x, *args, **kwargs)
    out: Ref = x if stack.norm is None else inner(call, ".norm", stack.norm, x)
    return out


class Encoder(Composite):
    name = "transformer_encoder"
    modules = (nn.TransformerEncoder,)

    def trace(self, call: Call) -> Ref:
        found = call.bind("src", "mask", "src_key_padding_mask", mask=None, src_key_padding_mask=None)
        padding = found["src_key_padding_mask"]
        assert call.module is not None
        if padding is not None and getattr(call.module, "use_nested_tensor", False):
            raise call.refuse(
                "src_key_padding_mask with nested tensors, which give 0 at padded positions on some devices",
                "Pass enable_nested_tensor=False to nn.TransformerEncoder",
            )
        x = call.ref(found["src"])
        return _stacked(call, call.module, x, src_mask=found["mask"], src_key_padding_mask=padding)


class Decoder(Composite):
    name = "transformer_decoder"
    modules = (nn.TransformerDecoder,)

    def trace(self, call: Call) -> Ref:
        names = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
        found = call.bind("tgt", "memory", *names, **dict.fromkeys(names))
        assert call.module is not None
        masks = {name: found[name] for name in names}
        return _stacked(call, call.module, call.ref(found["tgt"]), call.ref(found["memory"]), **masks)


class Transformer(Composite):
    name = "transformer"
    modules = (nn.Transformer,)

    def trace(self, call: Call) -> Ref:
        names = ("src_mask", "tgt_mask", "memory_mask", "src_key_padding_mask", "tgt_key_padding_mask",
                 "memory_key_padding_mask")  # fmt: skip
        found = call.bind("src", "tgt", *names, **dict.fromkeys(names))
        module = call.module
        assert isinstance(module, nn.Transformer)
        memory = inner(
            call, ".encoder", module.encoder, found["src"], mask=found["src_mask"], shape=call.out_shape,
            src_key_padding_mask=found["src_key_padding_mask"],
        )  # fmt: skip
        masks = {name: found[name] for name in names if not name.startswith("src")}
        out: Ref = inner(call, ".decoder", module.decoder, found["tgt"], memory, shape=call.out_shape, **masks)
        return out
