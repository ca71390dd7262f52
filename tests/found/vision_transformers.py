"""Attention on images."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tests.found.registry import found, reals


@found("vit", reals(3, 16, 16))
class ViT(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, dim) * 0.2)
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, dim), nn.Dropout(0.1))
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(dim, 10)))

    def forward(self, x: Tensor) -> Tensor:
        n, _c, h, _w = x.shape
        torch._assert(h == 16, f"Wrong image height! Expected 16 but got {h}!")
        x = self.conv_proj(x)
        x = x.reshape(n, 16, 16)
        x = x.permute(0, 2, 1)
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1)
        x = x + self.pos_embedding
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return self.heads(x[:, 0])


class TimmAttention(nn.Module):
    """qkv in one projection, the batch at axis 1 after the permute, then unbind."""

    def __init__(self, dim: int, num_heads: int = 2, unbind: bool = True) -> None:
        super().__init__()
        self.num_heads, self.unbind = num_heads, unbind
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.unbind:
            q, k, v = qkv.unbind(0)
        else:
            q, k, v = qkv[0], qkv[1], qkv[2]
        q = self.q_norm(q) * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


@found("deit", reals(3, 16, 16), slow=True)
class DeiT(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attns = nn.ModuleList([TimmAttention(dim), TimmAttention(dim, unbind=False)])
        self.ls = nn.ParameterList(nn.Parameter(torch.full((dim,), 0.3)) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.pos
        for norm, attn, gamma in zip(self.norms, self.attns, self.ls, strict=True):
            x = x + attn(norm(x)) * gamma
        return self.head(x.mean(dim=1))


def window_partition(x: Tensor, window_size: int) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    B = windows.shape[0] // (H * W // window_size // window_size)
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, dim: int, ws: int, num_heads: int) -> None:
        super().__init__()
        self.ws, self.num_heads, self.scale = ws, num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * ws - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid([torch.arange(ws), torch.arange(ws)], indexing="ij"))
        flat = torch.flatten(coords, 1)
        relative = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += ws - 1
        relative[:, :, 1] += ws - 1
        relative[:, :, 0] *= 2 * ws - 1
        self.register_buffer("relative_position_index", relative.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.softmax(attn)
        x = (attn @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    attn_mask: Tensor | None

    def __init__(self, dim: int, size: int, ws: int, shift: int) -> None:
        super().__init__()
        self.size, self.ws, self.shift = size, ws, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, ws, 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        if shift > 0:
            img_mask = torch.zeros((1, size, size, 1))
            cuts = (slice(0, -ws), slice(-ws, -shift), slice(-shift, None))
            for cnt, (h, w) in enumerate((h, w) for h in cuts for w in cuts):
                img_mask[:, h, w, :] = cnt
            windows = window_partition(img_mask, ws).view(-1, ws * ws)
            mask = windows.unsqueeze(1) - windows.unsqueeze(2)
            mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        else:
            mask = None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        H = W = self.size
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.ws).view(-1, self.ws * self.ws, C)
        windows = self.attn(windows, mask=self.attn_mask)
        x = window_reverse(windows.view(-1, self.ws, self.ws, C), self.ws, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, _L, C = x.shape
        x = x.view(B, self.size, self.size, C)
        x0 = x[:, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, :]
        x3 = x[:, 1::2, 1::2, :]
        x = torch.cat([x0, x1, x2, x3], -1).view(B, -1, 4 * C)
        return self.reduction(self.norm(x))


@found("swin", reals(3, 16, 16), slow=True)
class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.Sequential(SwinBlock(8, 8, 4, 0), SwinBlock(8, 8, 4, 2), PatchMerging(8, 8))
        self.norm = nn.LayerNorm(16)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.norm(self.layers(x))
        x = self.avgpool(x.transpose(1, 2))
        return self.head(torch.flatten(x, 1))


@found("detr", reals(3, 16, 16), slow=True)
class DETR(nn.Module):
    """The one-page DETR of its paper: learned queries, row and column embeddings, nn.Transformer, sequence first."""

    def __init__(self, hidden_dim: int = 16, nheads: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 4, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(12, hidden_dim, 1)
        self.transformer = nn.Transformer(hidden_dim, nheads, 1, 1, dim_feedforward=24)
        self.linear_class = nn.Linear(hidden_dim, 4)
        self.linear_bbox = nn.Linear(hidden_dim, 4)
        self.query_pos = nn.Parameter(torch.rand(5, hidden_dim))
        self.row_embed = nn.Parameter(torch.rand(10, hidden_dim // 2))
        self.col_embed = nn.Parameter(torch.rand(10, hidden_dim // 2))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        x = self.backbone(inputs)
        h = self.conv(x)
        H, W = h.shape[-2:]
        pos = torch.cat(
            [
                self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1),
                self.row_embed[:H].unsqueeze(1).repeat(1, W, 1),
            ],
            dim=-1,
        ).flatten(0, 1).unsqueeze(1)  # fmt: skip
        tgt = self.query_pos.unsqueeze(1).repeat(1, inputs.shape[0], 1)
        h = self.transformer(pos + 0.1 * h.flatten(2).permute(2, 0, 1), tgt).transpose(0, 1)
        return {"pred_logits": self.linear_class(h), "pred_boxes": self.linear_bbox(h).sigmoid()}


@found("detr decoder, batch first", reals(12, 16), slow=True)
class QueryDecoder(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(4, dim)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(dim, 2, 24, batch_first=True, norm_first=True, activation="gelu"), 2
        )
        self.head = nn.Linear(dim, 5)

    def forward(self, memory: Tensor) -> Tensor:
        queries = self.query_embed.weight.unsqueeze(0).expand(memory.size(0), -1, -1)
        return self.head(self.decoder(queries, memory))
