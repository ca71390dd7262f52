"""Segmentation, detection, image to image."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.found.registry import found, reals, unit


class DoubleConv(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
            nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, i: int, o: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(i, i, kernel_size=2, stride=2)
        self.conv = DoubleConv(i + o, o)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 6)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(6, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 10))
        self.up1 = Up(10, 8, bilinear)
        self.up2 = Up(8, 6, bilinear)
        self.outc = nn.Conv2d(6, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return torch.sigmoid(self.outc(x))


found("unet, transposed convolutions", reals(3, 21, 18))(partial(UNet, False))
found("unet, bilinear", reals(3, 21, 18))(partial(UNet, True))


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c), Conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 2) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c // 2), Conv(c * 2, c)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect(nn.Module):
    """The decode of YOLOv5: grids and anchors are constants."""

    anchors: Tensor
    strides = (8, 16)

    def __init__(self, channels: tuple[int, ...], nc: int = 3) -> None:
        super().__init__()
        self.nc, self.no, self.na = nc, nc + 5, 2
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in channels)
        self.register_buffer("anchors", torch.tensor([[[10.0, 13], [16, 30]], [[33, 23], [30, 61]]]))

    def _make_grid(self, nx: int, ny: int, i: int) -> tuple[Tensor, Tensor]:
        yv, xv = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        grid = torch.stack((xv, yv), 2).expand((1, self.na, ny, nx, 2)).float() - 0.5
        return grid, self.anchors[i].view((1, self.na, 1, 1, 2)).expand((1, self.na, ny, nx, 2))

    def forward(self, x: list[Tensor]) -> Tensor:
        z = []
        for i, m in enumerate(self.m):
            y = m(x[i])
            bs, _, ny, nx = y.shape
            y = y.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            grid, anchor_grid = self._make_grid(nx, ny, i)
            xy, wh, conf = y.sigmoid().split((2, 2, self.nc + 1), 4)
            xy = (xy * 2 + grid) * self.strides[i]
            wh = (wh * 2) ** 2 * anchor_grid
            z.append(torch.cat((xy, wh, conf), 4).view(bs, self.na * nx * ny, self.no))
        return torch.cat(z, 1)


@found("yolo v5", reals(3, 64, 64))
class YOLO(nn.Module):
    def __init__(self, detect: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 8, 3, 4), Conv(8, 8, 3, 2))
        self.c3 = C2f(8, 8)
        self.down = Conv(8, 12, 3, 2)
        self.sppf = SPPF(12)
        self.lateral = Conv(12, 8)
        self.up = nn.Upsample(None, 2, "nearest")
        self.out = C2f(16, 8, 1)
        self.detect = Detect((8, 12))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.c3(self.stem(x))
        p4 = self.sppf(self.down(p3))
        n3 = self.out(torch.cat([self.up(self.lateral(p4)), p3], 1))
        return self.detect([n3, p4])


class DFL(nn.Module):
    def __init__(self, c1: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


@found("yolo v8 head", reals(6, 8, 8), reals(6, 4, 4))
class YOLOv8Head(nn.Module):
    """Distances to the sides of a box from a distribution, decoded to corners; classes by sigmoid."""

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.nc, self.no = nc, nc + 32
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(6, 8, 3), nn.Conv2d(8, 32, 1)) for _ in range(2))
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(6, 8, 3), nn.Conv2d(8, nc, 1)) for _ in range(2))
        self.dfl = DFL()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = [a, b]
        points, strides = [], []
        for i, stride in enumerate((8, 16)):
            h, w = x[i].shape[2:]
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
            sx, sy = torch.arange(w, device=a.device) + 0.5, torch.arange(h, device=a.device) + 0.5
            gy, gx = torch.meshgrid(sy, sx, indexing="ij")
            points.append(torch.stack((gx, gy), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), float(stride)))
        anchors, stride = torch.cat(points).transpose(0, 1), torch.cat(strides).transpose(0, 1)
        box, cls = torch.cat([xi.view(a.shape[0], self.no, -1) for xi in x], 2).split((32, self.nc), 1)
        lt, rb = self.dfl(box).chunk(2, 1)
        x1y1 = anchors.unsqueeze(0) - lt
        x2y2 = anchors.unsqueeze(0) + rb
        dbox = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * stride
        return torch.cat((dbox, cls.sigmoid()), 1)


class FPN(nn.Module):
    def __init__(self, channels: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Conv2d(c, out, 1) for c in channels)
        self.layer_blocks = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in channels)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, values = list(x.keys()), list(x.values())
        last_inner = self.inner_blocks[-1](values[-1])
        results = [self.layer_blocks[-1](last_inner)]
        for idx in range(len(values) - 2, -1, -1):
            inner_lateral = self.inner_blocks[idx](values[idx])
            feat_shape = inner_lateral.shape[-2:]
            inner_top_down = F.interpolate(last_inner, size=feat_shape, mode="nearest")
            last_inner = inner_lateral + inner_top_down
            results.insert(0, self.layer_blocks[idx](last_inner))
        return OrderedDict(zip(names, results, strict=True))


@found("retinanet with shared heads", reals(3, 30, 34), slow=True)
class RetinaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c2 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True))
        self.c3 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.c4 = nn.Sequential(nn.Conv2d(8, 10, 3, 2, 1), nn.BatchNorm2d(10), nn.ReLU(True))
        self.fpn = FPN((6, 8, 10), 8)
        self.cls_head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.box_head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(s)) for s in (0.7, 1.0, 1.3)])

    def forward(self, x: Tensor) -> dict[str, Any]:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        features = list(self.fpn(OrderedDict([("0", c2), ("1", c3), ("2", c4)])).values())
        logits, boxes = [], []
        for scale, f in zip(self.scales, features, strict=True):
            cls = self.cls_head(f)
            n, _, h, w = cls.shape
            cls = cls.view(n, -1, 3, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 3)
            logits.append(cls)
            box = torch.exp((scale * self.box_head(f)).clamp(max=2.0))
            boxes.append(box.permute(0, 2, 3, 1).reshape(n, -1, 4))
        return {"scores": torch.cat(logits, dim=1).sigmoid(), "boxes": torch.cat(boxes, dim=1)}


class ASPPPooling(nn.Sequential):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@found("deeplab v3", reals(3, 33, 33))
class DeepLab(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        modules: list[nn.Module] = [nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())]
        modules += [
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=r, dilation=r, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            for r in (2, 4)
        ]
        modules.append(ASPPPooling(8, 6))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        x = self.backbone(x)
        _res: list[Tensor] = []
        for conv in self.convs:
            _res += [conv(x)]
        x = self.classifier(self.project(torch.cat(_res, dim=1)))
        x = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        result = OrderedDict()
        result["out"] = x
        result["labels"] = x.argmax(1)
        return result


@found("super-resolution", unit(3, 12, 14), least_db=40.0)
class SuperResolution(nn.Module):
    """Cubic interpolation keeps the scale of the image, so what overshoots the brightest pixel saturates."""

    def __init__(self, upscale: int = 2) -> None:
        super().__init__()
        self.upscale = upscale
        self.head = nn.Conv2d(3, 8, 5, padding=2)
        self.prelu = nn.PReLU(8)
        self.body = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate") for _ in range(3)])
        self.tail = nn.Conv2d(8, 3 * upscale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, lr: Tensor) -> Tensor:
        feat = self.prelu(self.head(lr))
        x = feat
        for conv in self.body:
            x = x + 0.2 * F.leaky_relu(conv(x), 0.2, True)
        x += feat
        out = self.shuffle(self.tail(x))
        base = F.interpolate(lr, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        return (out + base).clamp(0.0, 1.0)


@found("autoencoder with reflection and instance norm", unit(3, 16, 20))
class AutoEncoder(nn.Module):
    """The style transfer network: values of 0 to 1 in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.InstanceNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.dec = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = (x - 0.5) / 0.5
        y = self.dec(self.enc(y))
        y = F.relu_(F.instance_norm(y))
        y = self.out(F.pad(y, (1, 1, 1, 1), mode="reflect"))
        return (torch.tanh(y) + 1) / 2
