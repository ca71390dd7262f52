"""Several inputs and outputs, and idioms of writing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.found.registry import found, ids, reals


@found("siamese", reals(3, 16, 16), reals(3, 16, 16))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16),
        )  # fmt: skip

    def forward_once(self, x: Tensor) -> Tensor:
        return F.normalize(self.backbone(x), dim=-1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        za, zb = self.forward_once(a), self.forward_once(b)
        return (za * zb).sum(dim=-1), (za - zb).pow(2).sum(-1).sqrt()


@found("in-place everywhere", reals(4, 10, 10))
class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu_()
        x = self.bn(x)
        y = self.conv2(x)
        y.add_(x).mul_(self.alpha)
        y -= 0.25
        y /= 2
        y *= torch.sigmoid_(self.conv2(y))
        F.relu_(y)
        y.clamp_(max=3)
        return y.sub_(0.1).neg_().square_()


@found("batch norm after the activation", reals(3, 12, 12))
def bn_after_activation() -> nn.Module:
    def block(i: int, o: int, act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), act, nn.BatchNorm2d(o))

    return nn.Sequential(
        nn.BatchNorm2d(3), block(3, 6, nn.ELU()), block(6, 8, nn.LeakyReLU(0.1, inplace=True)), nn.MaxPool2d(2),
        block(8, 8, nn.ReLU()), nn.Dropout2d(0.1), nn.Flatten(), nn.LazyLinear(10), nn.BatchNorm1d(10),
        nn.Softmax(dim=-1),
    )  # fmt: skip


@found("multi-task", reals(3, 16, 16))
class MultiTask(nn.Module):
    """Activations by name, a branch on ``self.training``, outputs in a nested dict."""

    ACTS = nn.ModuleDict({"hswish": nn.Hardswish(), "softplus": nn.Softplus(), "selu": nn.SELU()})

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.act = {"relu": F.relu, "hswish": F.hardswish}["hswish"]
        self.cls = nn.Linear(8, 5)
        self.aux = nn.Linear(8, 2)
        self.depth = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.act(self.trunk(x))
        pooled = x.mean((2, 3))
        logits = self.cls(pooled)
        out = {"cls": {"logits": logits, "prob": logits.softmax(-1), "label": logits.argmax(dim=1)}}
        if self.training:
            out["aux"] = self.aux(pooled)
        out["depth"] = F.softplus(self.depth(x)).squeeze(1)
        values, indices = logits.topk(2)
        return {**out, "top": (values, indices)}


@found("einsum and stacks", reals(4, 6, 8))
class EinsumNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])
        self.w = nn.Parameter(torch.randn(8, 5) * 0.3)
        self.mix = nn.Parameter(torch.randn(4, 4) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("nchw,cd->ndhw", x, self.mix)
        branches = torch.stack([mixed * e for e in self.embeds], dim=1)
        weights = branches.mean(dim=(2, 3, 4)).softmax(1)
        combined = torch.einsum("nkchw,nk->nchw", branches, weights)
        att = torch.einsum("bchw,bdhw->bcd", combined, x)
        out = torch.where(att > 0, att, 0.1 * att)
        tokens = combined.flatten(2).transpose(1, 2)
        a, b = tokens.split([3, 1], dim=-1)
        scored = (combined @ self.w).amax(dim=(1, 2))
        return torch.cat([out.flatten(1), (a**2).sum(1), b.abs().mean(1).sqrt(), scored], dim=1)


@found("mixture of experts, dense", reals(6, 8))
class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        top, _ = scores.topk(2, dim=-1)
        kept = scores.masked_fill(scores < top[..., -1:], -1e9)
        weights = F.softmax(kept, dim=-1)
        outs = torch.stack([e(x) for e in self.experts], dim=-2)
        return (weights.unsqueeze(-1) * outs).sum(dim=-2)


@found("cbam and coordinate attention", reals(8, 10, 12))
class CBAM(nn.Module):
    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, c))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.conv1 = nn.Conv2d(c, 8, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv_h, self.conv_w = nn.Conv2d(8, c, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        avg = F.avg_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3))).view(x.size(0), -1)
        mx = F.max_pool2d(x, (x.size(2), x.size(3))).flatten(1)
        scale = torch.sigmoid(self.mlp(avg) + self.mlp(mx)).unsqueeze(2).unsqueeze(3).expand_as(x)
        x = x * scale
        compress = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        x = x * torch.sigmoid(self.spatial(compress))
        _n, _c, h, w = x.size()
        x_h = x.mean(dim=3, keepdim=True)
        x_w = x.mean(dim=2, keepdim=True).permute(0, 1, 3, 2)
        y = self.bn1(self.conv1(torch.cat([x_h, x_w], dim=2)))
        y = y * (F.relu6(y + 3, inplace=True) / 6)
        x_h, x_w = torch.split(y, [h, w], dim=2)
        a_w = self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid()
        return x * a_w * self.conv_h(x_h).sigmoid()


@found("keypoints by soft argmax", reals(3, 16, 16))
class SoftArgmax(nn.Module):
    def __init__(self, k: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, k, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        heat = self.net(x)
        b, k, h, w = heat.shape
        p = F.softmax(heat.reshape(b, k, -1) * 2.0, dim=2).reshape(b, k, h, w)
        xs = torch.linspace(-1, 1, w).to(p)
        ys = torch.linspace(-1, 1, h).to(p)
        ex = (p.sum(dim=2) * xs).sum(dim=-1)
        ey = torch.sum(p.sum(dim=3) * ys, dim=-1)
        return torch.stack((ex, ey), dim=-1)


@found("dlrm", ids(10, 3), reals(5))
class DLRM(nn.Module):
    """Pairwise dot products of embeddings, the upper triangle by constant indices."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, d) for _ in range(3))
        self.bottom = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, d), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(d + 6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        x = self.bottom(dense)
        ly = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        batch_size, d = x.shape
        T = torch.cat([x, *ly], dim=1).view((batch_size, -1, d))
        Z = torch.bmm(T, torch.transpose(T, 1, 2))
        _, ni, nj = Z.shape
        li = torch.tensor([i for i in range(ni) for j in range(i)])
        lj = torch.tensor([j for i in range(nj) for j in range(i)])
        Zflat = Z[:, li, lj]
        R = torch.cat([x, Zflat], dim=1)
        return self.top(R).squeeze(1)


@found("mlp-mixer", reals(3, 16, 16))
class Mixer(nn.Module):
    def __init__(self, d: int = 12, tokens: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, d, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm([tokens, d])
        self.token = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.channel = nn.Sequential(nn.Linear(d, 20), nn.GELU(), nn.Linear(20, d))
        self.head = nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.view(*x.shape[:2], -1).mT
        x = x + self.token(self.norm1(x).mT).mT
        x = x + self.channel(self.norm2(x))
        return self.head(x.mean(-2))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


@found("diffusion unet block", reals(4, 8, 8), ids(100))
class DiffusionBlock(nn.Module):
    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 2 * c))
        self.inp = nn.Conv2d(4, c, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(2, c), nn.GroupNorm(4, c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 4, 3, padding=1)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.out = nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(timestep_embedding(t, 8))
        while len(emb.shape) < len(x.shape):
            emb = emb[..., None]
        h = self.conv1(F.silu(self.norm1(self.inp(x))))
        scale, shift = emb.chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        b, c, *spatial = h.shape
        flat = h.reshape(b, c, -1)
        q, k, v = self.qkv(flat).chunk(3, dim=1)
        s = 1 / math.sqrt(math.sqrt(c))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * s, k * s), dim=-1)
        a = torch.einsum("bts,bcs->bct", weight, v)
        h = (flat + self.out(a)).reshape(b, c, *spatial)
        return self.conv2(F.silu(h))


@found("functional only", reals(5, 7))
class Functional(nn.Module):
    """No modules: parameters and torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(9, 7) * 0.4), nn.Parameter(torch.randn(9))
        self.w2 = nn.Parameter(torch.randn(9, 4) * 0.4)
        self.k = nn.Parameter(torch.randn(5, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.k, padding=1, groups=5)
        h = torch.addmm(self.b1, x.reshape(-1, 7), self.w1.t()).view(-1, 5, 9)
        h = F.gelu(h) + torch.exp(-h.abs()).log1p()
        h = h / (1e-3 + h.std(dim=-1, keepdim=True))
        y = h @ self.w2
        y = y - y.min(dim=1, keepdim=True).values
        return (y / y.amax(1, keepdim=True).clamp(min=0.5)).permute(0, 2, 1)
