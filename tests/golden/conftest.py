"""Golden vectors that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx, to_program
from qatlib.fake.qconfig import FakeQuantSpec, QConfig, get_default_qconfig
from qatlib.fake.stubs import QuantStub
from qatlib.golden import Golden, load_golden, write_golden
from qatlib.program import Program
from tests.golden.planting import BATCH
from tests.kind_nets import NETS
from tests.models import calibrated, everything, images, model


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def _written(program: Program, x: torch.Tensor, folder: Path) -> Golden:
    write_golden(program, x, folder)
    return load_golden(folder)


@pytest.fixture(scope="package")
def program() -> Program:
    return convert_fx(calibrated(everything(), images(8))).program


@pytest.fixture(scope="package")
def golden(program: Program, folder: Path) -> Golden:
    return _written(program, images(BATCH, seed=3), folder / "everything")


@pytest.fixture(scope="package")
def ties(folder: Path) -> Golden:
    """A pool and a sum whose exact results lie between two codes in a quarter or more of the elements."""

    def at(scale: float) -> QConfig:
        return QConfig(activation=FakeQuantSpec(scale=scale))

    net = model(
        lambda s, x: (lambda y: s.act(s.pool(y) + F.max_pool2d(y, 2)))(s.q(x)),
        q=QuantStub(1 / 16), pool=nn.AvgPool2d(2), act=nn.ReLU(),
    )  # fmt: skip
    names = {"pool": at(1 / 16), "add": at(1 / 8)}
    one = calibrated(net, images(2), qconfig_dict={"": at(1 / 16), "module_name": names})
    return _written(convert_fx(one).program, images(2, seed=3), folder / "ties")


@pytest.fixture(scope="package")
def narrow(folder: Path) -> Golden:
    """An input and a convolution that saturate."""
    net = model(lambda s, x: s.c(s.q(x)).flatten(1), q=QuantStub(0.01), c=nn.Conv2d(3, 4, 3))
    small = {"": QConfig(), "module_name": {"c": QConfig(activation=FakeQuantSpec(scale=0.004))}}
    one = calibrated(net, images(4), qconfig_dict=small)
    return _written(convert_fx(one).program, images(4), folder / "narrow")


@pytest.fixture(scope="package")
def wide(folder: Path) -> Golden:
    """int16 throughout."""
    net = model(lambda s, x: s.d(F.relu(s.c(x))), c=nn.Conv2d(3, 8, 3), d=nn.Conv2d(8, 4, 3))
    one = calibrated(net, images(4), qconfig_dict={"": get_default_qconfig("int16")})
    return _written(convert_fx(one).program, images(4, seed=3), folder / "wide")


@pytest.fixture(scope="package")
def island(folder: Path) -> Golden:
    """A float island with int8 output, one with float output and a quantize behind it, truth values, positions."""
    net = model(
        lambda s, x: (lambda y: (y > 0.1, y.flatten(1).argmax(1), s.d(torch.log(y.abs() + 1))))(s.c(x)),
        c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 4, 3),
    )  # fmt: skip
    one = calibrated(net, images(4), hybrid=True, hybrid_dict={"module_name": ["log"]})
    return _written(to_program(one, ["c"]), images(4, seed=3), folder / "island")


@pytest.fixture(scope="package")
def nets(folder: Path) -> dict[str, Golden]:
    """Golden vectors of all small nets, which hold every kind of op."""
    made = {}
    for i, (name, net) in enumerate(NETS.items()):
        write_golden(net.program(), net.inputs, folder / f"net{i}")
        made[name] = load_golden(folder / f"net{i}")
    return made
