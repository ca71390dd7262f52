"""Attention on text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.found.registry import found, ids, lengths_mask, reals


@dataclass
class BertConfig:
    vocab_size: int = 50
    hidden_size: int = 16
    num_attention_heads: int = 2
    intermediate_size: int = 32
    hidden_act: str = "gelu"
    max_position_embeddings: int = 12
    layer_norm_eps: float = 1e-12
    num_hidden_layers: int = 2
    extra: dict[str, Any] = field(default_factory=dict)


ACT2FN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": nn.Mish(),
}


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        x = x.view(new_x_shape)
        return x.permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        attention_scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        attention_scores = attention_scores / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            attention_scores = attention_scores + attention_mask
        attention_probs = nn.functional.softmax(attention_scores, dim=-1)
        context_layer = torch.matmul(attention_probs, value_layer)
        context_layer = context_layer.permute(0, 2, 1, 3).contiguous()
        new_context_layer_shape = (*context_layer.size()[:-2], self.all_head_size)
        return context_layer.view(*new_context_layer_shape)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertSelfAttention(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm1(self.dense(self.attention(x, mask)) + x)
        return self.norm2(self.output(self.act(self.intermediate(x))) + x)


@found("bert", ids(50, 10), lengths_mask(10), ids(2, 10), slow=True)
class Bert(nn.Module):
    position_ids: Tensor

    def __init__(self, config: BertConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BertConfig()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)))
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        input_shape = input_ids.size()
        seq_length = input_shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros(input_shape, dtype=torch.long, device=input_ids.device)
        position_ids = self.position_ids[:, :seq_length]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x += self.position_embeddings(position_ids)
        x = self.norm(x)
        if attention_mask is None:
            extended = None
        else:
            extended = attention_mask[:, None, None, :]
            extended = extended.to(dtype=torch.float32)
            extended = (1.0 - extended) * -10000.0
        for layer in self.layer:
            x = layer(x, extended)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return {"last_hidden_state": x, "logits": self.classifier(pooled)}


@found("bert without its optional inputs, mean pooled", ids(50, 8))
class MeanBert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = Bert(BertConfig(hidden_act="gelu_new", num_hidden_layers=1))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.bert(input_ids)["last_hidden_state"]
        return F.normalize(hidden.mean(1), p=2, dim=1)


@found("sentence encoder", ids(50, 10), lengths_mask(10))
class SentenceEncoder(nn.Module):
    """Key padding by masked_fill with -inf, mean pooling over what the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.attn = BertSelfAttention(BertConfig())
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        a = self.attn
        q, k, v = (a.transpose_for_scores(f(x)) for f in (a.query, a.key, a.value))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / a.attention_head_size**0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        out = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2)
        hidden = self.norm(x + out)
        expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
        pooled = torch.sum(hidden * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
        return F.normalize(pooled, p=2, dim=1)


class CausalSelfAttention(nn.Module):
    bias: Tensor

    def __init__(self, n_embd: int, n_head: int, block: int, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd, self.flash = n_head, n_embd, flash
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


@found("gpt", ids(40, 9), slow=True)
class GPT(nn.Module):
    def __init__(self, n_embd: int = 16, block: int = 12) -> None:
        super().__init__()
        self.block_size = block
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(40, n_embd),
                "wpe": nn.Embedding(block, n_embd),
                "ln": nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(3)),
                "h": nn.ModuleList(CausalSelfAttention(n_embd, 2, block, flash) for flash in (True, False)),
            }
        )
        self.mlp = nn.Sequential(nn.Linear(n_embd, 32), nn.GELU(approximate="tanh"), nn.Linear(32, n_embd))
        self.lm_head = nn.Linear(n_embd, 40, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        device = idx.device
        _b, t = idx.size()
        assert t <= self.block_size, f"Cannot forward sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        x = x + self.transformer.h[0](self.transformer.ln[0](x))
        x = x + self.transformer.h[1](self.transformer.ln[1](x))
        x = x + self.mlp(self.transformer.ln[2](x))
        return self.lm_head(x[:, [-1], :])


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_half_by_chunk(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x2.neg(), x1), dim=-1)


@found("llama", ids(40, 8))
class Llama(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int = 16, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.hd = heads, kv_heads, dim // heads
        self.embed_tokens = nn.Embedding(40, dim)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.hd, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.hd, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.gate, self.up, self.down = (nn.Linear(dim, 24, bias=False), nn.Linear(dim, 24, bias=False),
                                         nn.Linear(24, dim, bias=False))  # fmt: skip
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(3))
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, self.hd, 2).float() / self.hd)))

    def forward(self, tokens: Tensor) -> Tensor:
        bsz, seqlen = tokens.shape
        h = self.embed_tokens(tokens)
        position_ids = torch.arange(seqlen, device=tokens.device).unsqueeze(0)
        freqs = (self.inv_freq[None, :, None].float() @ position_ids[:, None, :].float()).transpose(1, 2)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos().unsqueeze(1), emb.sin().unsqueeze(1)
        x = self.norms[0](h)
        xq = self.wq(x).view(bsz, seqlen, self.heads, self.hd).transpose(1, 2)
        xk = self.wk(x).view(bsz, seqlen, self.kv_heads, self.hd).transpose(1, 2)
        xv = self.wv(x).view(bsz, seqlen, self.kv_heads, self.hd).transpose(1, 2)
        xq = (xq * cos) + (rotate_half(xq) * sin)
        xk = (xk * cos) + (rotate_half_by_chunk(xk) * sin)
        rep = self.heads // self.kv_heads
        keys = (
            xk[:, :, None, :, :]
            .expand(bsz, self.kv_heads, rep, seqlen, self.hd)
            .reshape(bsz, self.heads, seqlen, self.hd)
        )
        values = xv.repeat_interleave(rep, dim=1)
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
        mask = torch.triu(mask, diagonal=1)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.hd)
        scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        h = h + self.wo(output)
        x = self.norms[1](h)
        h = h + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.linear(self.norms[2](h), self.embed_tokens.weight)


@found("hugging face masks", reals(7, 16), lengths_mask(7))
class MaskedDecoder(nn.Module):
    """A causal mask and a padding mask in one, of the smallest number that the dtype has."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = BertSelfAttention(BertConfig())
        self.norm = nn.LayerNorm(16)

    def _causal(self, length: int, dtype: torch.dtype) -> Tensor:
        mask = torch.full((length, length), torch.finfo(dtype).min)
        cond = torch.arange(mask.size(-1))
        mask.masked_fill_(cond < (cond + 1).view(mask.size(-1), 1), 0)
        return mask[None, None, :, :]

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        expanded = attention_mask[:, None, None, :].expand(-1, 1, x.shape[1], -1).to(torch.float32)
        inverted = 1.0 - expanded
        padding = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(torch.float32).min)
        x = x + self.attn(self.norm(x), padding)
        return x + self.attn(x, self._causal(x.shape[1], torch.float32))
