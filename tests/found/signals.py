"""Signals, points, volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.grid_sample import warp
from tests.found.registry import found, ids, reals


class GatedResidual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.pad = (3 - 1) * dilation
        self.filter = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.res = nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.pad(x, (self.pad, 0))
        z = torch.tanh(self.filter(y)) * torch.sigmoid(self.gate(y))
        return self.res(z) + x, self.skip(z)


@found("wavenet", reals(1, 40))
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.blocks = nn.ModuleList(GatedResidual(8, 2**i) for i in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skips = []
        for block in self.blocks:
            x, skip = block(x)
            skips.append(skip)
        return F.log_softmax(self.end(sum(skips)), dim=1)


class Chomp1d(nn.Module):
    def __init__(self, chomp: int) -> None:
        super().__init__()
        self.chomp_size = chomp

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        self.net = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(i, o, 3, padding=pad, dilation=dilation)),
            Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv1d(o, o, 3, padding=pad, dilation=dilation), Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


@found("tcn with weight norm", reals(4, 24))
class TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(TemporalBlock(4, 8, 1), TemporalBlock(8, 8, 2))
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x)[:, :, -1])


@found("3-d convolutions", reals(2, 6, 12, 12))
class Net3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(6), nn.ReLU(True))
        self.conv2_1 = nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn = nn.BatchNorm3d(8)
        self.pool = nn.MaxPool3d((2, 2, 2))
        self.avg = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.conv2_1(self.stem(x)))))
        return self.fc(self.avg(x).flatten(1))


class TNet(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv = nn.Conv1d(k, 12, 1)
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, k * k)
        self.bn1, self.bn2 = nn.BatchNorm1d(12), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 12)
        x = self.fc2(F.relu(self.bn2(self.fc1(x))))
        iden = torch.eye(self.k).view(1, self.k * self.k).repeat(batchsize, 1)
        if x.is_cuda:
            iden = iden.cuda()
        x = x + iden
        return x.view(-1, self.k, self.k)


@found("pointnet", reals(3, 20))
class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stn = TNet(3)
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 12, 1), nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n_pts = x.size()[2]
        trans = self.stn(x)
        x = x.transpose(2, 1)
        x = torch.bmm(x, trans)
        x = x.transpose(2, 1)
        pointfeat = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(pointfeat))
        x = torch.max(x, 2)[0]
        glob = x.unsqueeze(2).repeat(1, 1, n_pts)
        per_point = torch.cat([glob, pointfeat], 1).mean(-1)
        return F.log_softmax(self.fc(x), dim=-1) + per_point[:, :5]


@found("spatial transformer", reals(1, 20, 20), wide=("affine_grid",))
class STN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, 7), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(4, 6, 3), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(6 * 2 * 2, 12), nn.ReLU(True), nn.Linear(12, 3 * 2))
        self.fc_loc[2].weight.data.mul_(0.1)
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.conv = nn.Conv2d(1, 4, 3)

    def stn(self, x: Tensor) -> Tensor:
        xs = self.localization(x)
        xs = xs.view(-1, 6 * 2 * 2)
        theta = self.fc_loc(xs)
        theta = theta.view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stn(x)
        return F.relu(F.max_pool2d(self.conv(x), 2)).mean((2, 3))


@found("bird's-eye view by warp", reals(3, 16, 16), wide=("mul",))
class BEV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.flow = nn.Conv2d(6, 2, 3, 1, 1)
        self.fuse = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.image(x)
        offsets = torch.tanh(self.flow(f)) * 3.0
        warped = warp(f, offsets.permute(0, 2, 3, 1), padding_mode="border")
        return self.fuse(torch.cat((f, warped), 1))


@found("lstm tagger", ids(30, 7), slow=True)
class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.hidden2tag = nn.Linear(12, 4)

    def forward(self, sentence: Tensor) -> Tensor:
        embeds = self.word_embeddings(sentence)
        lstm_out, (_h, _c) = self.lstm(embeds)
        tag_space = self.hidden2tag(lstm_out)
        return F.log_softmax(tag_space, dim=-1)


@found("gru with attention pooling", reals(9, 6), slow=True)
class GRUAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True, bidirectional=True)
        self.score = nn.Linear(16, 1, bias=False)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(2, x.size(0), 8).to(x.device)
        out, hn = self.gru(x, h0)
        weights = F.softmax(self.score(torch.tanh(out)), dim=1)
        context = (out * weights).sum(1)
        last = torch.cat((hn[-2], hn[-1]), dim=1)
        return self.fc(torch.cat([context, last], dim=1))
