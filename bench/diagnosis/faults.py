"""What is planted, and what has to be said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

Params = Mapping[str, Mapping[str, Any]]
Weights = Callable[[nn.Module], None]


def nothing(model: nn.Module) -> None:
    """Weights as trained."""


@dataclass(frozen=True)
class Fault:
    """One fault in one network.

    ``code`` and ``module`` are those of the finding that names it; a fault of the whole network has no module, and the
    finding may name any. ``also`` are codes that follow from it: a range
    that is too wide costs accuracy, too. ``params`` go over those of every trial; ``model`` and ``data`` are arguments
    of the factories, with which the network is trained, too, unless ``late``; ``weights`` changes what was trained.
    """

    name: str
    net: str
    code: str
    module: str
    also: tuple[str, ...] = ()
    params: Params = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = nothing
    late: bool = False

    @property
    def planted(self) -> tuple[str, str, str, str]:
        """What tells a fault from the others, as of its row."""
        return self.name, self.net, self.code, self.module


# -- faults of weights -------------------------------------------------------------------------------------------------


def rescale(producer: str, norm: str, consumers: tuple[str, ...], factors: torch.Tensor, model: nn.Module) -> None:
    """Multiply channels of ``norm``, or of ``producer`` where that is empty, by ``factors`` ``[C]``.

    The weights of the consumers are divided by them: behind relu the network computes what it did.
    """
    with torch.no_grad():
        source = model.get_submodule(norm or producer)
        for name in ("weight", "bias"):
            parameter = source.get_parameter(name)
            parameter.mul_(factors.view(-1, *[1] * (parameter.dim() - 1)))
        for consumer in consumers:
            weight = model.get_submodule(consumer).get_parameter("weight")
            if weight.shape[1] == 1 and weight.shape[0] == len(factors):  # depthwise
                weight.div_(factors.view(-1, 1, 1, 1))
            else:
                weight[:, : len(factors)].div_(factors.view(1, -1, *[1] * (weight.dim() - 2)))


def decades(channels: int, count: float) -> torch.Tensor:
    """Factors that spread over ``count`` powers of ten."""
    return 10 ** (count * (torch.rand(channels, generator=torch.Generator().manual_seed(3)) - 0.5))


def one_of(channels: int, factor: float) -> torch.Tensor:
    factors = torch.ones(channels)
    factors[5] = factor
    return factors


def shift(norm: str, consumer: str, by: float, model: nn.Module) -> None:
    """Add ``by`` to all channels of ``norm`` and take it away again behind ``consumer``: in its bias, or in the norm
    that ``consumer`` names after a comma. Nothing between the two may clip or pad.
    """
    reader, _, behind = consumer.partition(", ")
    with torch.no_grad():
        model.get_submodule(norm).get_parameter("bias").add_(by)
        added = by * model.get_submodule(reader).get_parameter("weight").flatten(1).sum(1)
        if behind:
            model.get_submodule(behind).get_buffer("running_mean").add_(added)
        else:
            model.get_submodule(reader).get_parameter("bias").sub_(added)


def kill(conv: str, channels: slice, model: nn.Module) -> None:
    """Weights of output channels set to zero."""
    with torch.no_grad():
        model.get_submodule(conv).get_parameter("weight")[channels] = 0


def flatten(layer: str, model: nn.Module) -> None:
    """All weights of a layer as large as the largest of their channel, so that sums reach what they can."""
    with torch.no_grad():
        weight = model.get_submodule(layer).get_parameter("weight")
        weight.copy_(weight.abs().flatten(1).amax(1).view(-1, 1, 1, 1).expand_as(weight))


def forget(model: nn.Module) -> None:
    """Random weights: what a checkpoint that was not loaded leaves."""
    torch.manual_seed(5)
    for part in model.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def override(match: str, **changes: Any) -> Params:
    return {"qconfig": {"overrides": [{"match": match, **changes}]}}


BRANCHES, MOBILE, ATTENTION = "branches", "mobile", "attention"
ALL = (BRANCHES, MOBILE, ATTENTION)
LOSSES = ("QAT001", "QAT002", "QAT029", "QAT031")
"""What a loss of accuracy is called at each step; it follows from most faults."""
COARSE = ("QAT008", *LOSSES)


def each(
    nets: Iterable[str], name: str, code: str, module: str = "", also: tuple[str, ...] = (), **how: Any
) -> list[Fault]:
    return [Fault(name, net, code, module, also, **how) for net in nets]


def float_models() -> list[Fault]:
    """The float model and its inputs."""
    free: Params = {"qconfig": {"inputs": []}}
    found = each(ALL, "weights not loaded", "QAT012", "", ("QAT013", "QAT031"), weights=forget)
    found += each((ATTENTION, MOBILE), "learned by heart", "QAT013", "", ("QAT012",), data={"limit": 96})
    for nets, name, fault in (
        (ALL, "input in [0, 255]", "bytes"),
        ((BRANCHES, ATTENTION), "input in [0, 1]", "positive"),
        ((MOBILE,), "input in [-3, 3]", "standardized"),
    ):
        found += each(nets, name, "QAT005", "x", ("QAT012",), params=free, data={"fault": fault})
    dull = {"fault": "dull calibration"}
    found += each(
        (BRANCHES, MOBILE),
        "input without a fixed scale",
        "QAT006",
        "x",
        ("QAT008", "QAT033"),
        params=free,
        data=dull,
        late=True,
    )
    return found


def calibration() -> list[Fault]:
    cut: Params = {"calibrate": {"percentile": 40.0}}
    few: Params = {"calibrate": {"batches": 1, "batch_size": 16}}
    cuts = ("QAT008", "QAT019", "QAT029", "QAT033")
    dim = {"fault": "dim calibration"}
    return [
        *each((BRANCHES, MOBILE), "calibration that cuts most values", "QAT001", "", cuts, params=cut),
        *each(ALL, "16 samples to calibrate on", "QAT032", "", ("QAT033",), params=few),
        *each(ALL, "dim images to calibrate on", "QAT033", "", COARSE, data=dim, late=True),
    ]


def ranges() -> list[Fault]:
    """What training may leave in the weights; the network stays as it was, but for dead channels."""
    unlike, one = "channels in units of their own", "one channel 100 times the others"
    follows = ("QAT011", *LOSSES)

    def scaled(layer: str, norm: str, readers: tuple[str, ...], factors: torch.Tensor) -> Weights:
        return partial(rescale, layer, norm, readers, factors)

    left, right = ("left.0", "left.1", ("mix.0",)), ("two.expand.0", "two.expand.1", ("two.depth.0",))
    first, last = ("one.expand.0", "one.expand.1", ("one.depth.0",)), ("last.0", "last.1", ("head",))
    depth = ("two.depth.0", "two.depth.1", ("two.project.0",))
    large = (*COARSE, "QAT009", "QAT039")
    return [
        Fault(unlike, BRANCHES, "QAT039", "left.0", ("QAT009", *follows), weights=scaled(*left, decades(16, 3.0))),
        Fault(unlike, MOBILE, "QAT039", "one.expand.0", follows, weights=scaled(*first, decades(64, 3.0))),
        Fault(unlike, MOBILE, "QAT039", "two.depth.0", follows, weights=scaled(*depth, decades(64, 3.0))),
        Fault(one, BRANCHES, "QAT011", "left.0", large, weights=scaled(*left, one_of(16, 100.0))),
        Fault(one, MOBILE, "QAT011", "two.expand.0", large, weights=scaled(*right, one_of(64, 100.0))),
        Fault(one, MOBILE, "QAT011", "last.0", large, weights=scaled(*last, one_of(64, 100.0))),
        *(
            Fault(f"one part of cat {factor:g} times the other", BRANCHES, "QAT009", "cat", COARSE,
                  weights=scaled(*left, torch.full((16,), factor)))
            for factor in (30.0, 100.0)
        ),
        *(
            Fault("three channels of zeros", net, "QAT010", layer, weights=partial(kill, layer, slice(0, 3)))
            for net, layer in ((BRANCHES, "deep"), (MOBILE, "one.project.0"), (ATTENTION, "up"))
        ),
        Fault("a layer of zeros", BRANCHES, "QAT010", "right.0", ("QAT012", "QAT013", "QAT019", "QAT031"),
              weights=partial(kill, "right.0", slice(None))),
    ]  # fmt: skip


def formats() -> list[Fault]:
    rounded: Params = {"qconfig": {"outputs": {"high_precision": False}}}
    wide = {"qconfig": {"overrides": [{"match": "mix.0", "activation": "int16"}, {"match": "deep", "weight": "int16"}]}}
    machine = {"compile": {"target": "qatlib/targets/bernoulli-like.yaml"}}
    return [
        *each(ALL, "scores rounded to int8", "QAT007", "head", params=rounded),
        *each(ALL, "sigmoid at the output", "QAT024", "sigmoid", LOSSES, model={"fault": "sigmoid"}, late=True),
        *(
            Fault(f"fixed scale of {scale:g}", net, "QAT027", layer, COARSE, params=override(layer, scale=scale))
            for net, layer, scale in (
                (BRANCHES, "deep", 0.002), (MOBILE, "last.0", 0.001), (ATTENTION, "up", 2.0),
                (MOBILE, "one.depth.0", 3.0),
            )
        ),
        Fault("int16 into an int8 cat", BRANCHES, "QAT034", "cat", params=override("left.0", activation="int16")),
        Fault("int16 into an int8 sum", MOBILE, "QAT034", "two.project.0",
              params=override("one.project.0", activation="int16")),
        Fault("int16 weights times int16 values", BRANCHES, "QAT014", "deep", ("QAT020", "QAT034"), params=wide),
        Fault("int16 into equal weights", BRANCHES, "QAT014", "deep", ("QAT012", "QAT013", "QAT034", *LOSSES),
              params=override("mix.0", activation="int16"), weights=partial(flatten, "deep")),
        Fault("int16 for an int8 machine", BRANCHES, "QAT020", "", ("QAT034",),
              params={**override("left.0", activation="int16"), **machine}),
        Fault("int16 for an int8 machine", MOBILE, "QAT020", "",
              params={**override("one.depth.0", activation="int16"), **machine}),
    ]  # fmt: skip


def structure() -> list[Fault]:
    wide = [{"match": layer, "activation": "int16"} for layer in ("up", "gelu")]
    few = [{"match": "gelu", "division": "uniform", "entries": 8}]
    table: Params = {"qconfig": {"overrides": wide}, "convert": {"tables": few}}
    return [
        Fault("batch norm behind relu", BRANCHES, "QAT026", "stem_norm", model={"fault": "norm after relu"}),
        Fault("a second reader before the batch norm", BRANCHES, "QAT026", "deep_norm",
              model={"fault": "two readers"}, late=True),
        Fault("a table of 8 steps", ATTENTION, "QAT023", "gelu", ("QAT004", "QAT015"), params=table),
        Fault("a branch left in float", BRANCHES, "QAT021", "", ("QAT020",),
              params={"qat": {"hybrid": ["deep", "mix"]}}),
        Fault("a block left in float", MOBILE, "QAT021", "", ("QAT020",), params={"qat": {"hybrid": ["one"]}}),
    ]  # fmt: skip


def measured() -> list[Fault]:
    """What only ``analyze.sensitivity`` sees; it is on for these faults alone."""

    def study(conversion: bool = False, bad_cases: int = 0) -> Params:
        asked = {"kinds": ["off", "int16"], "parts": False, "steps": False, "metric": False, "batch_size": 32}
        return {"analyze": {"sensitivity": {"images": 64, **asked, "conversion": conversion, "bad_cases": bad_cases}}}

    def table(**settings: Any) -> Params:
        wide = {"overrides": [{"match": layer, "activation": "int16"} for layer in ("up", "gelu")]}
        return {"qconfig": wide, "convert": {"tables": [{"match": "gelu", **settings}]}, **study(conversion=True)}

    far = "values far from 0, which the next layer takes back"
    lossy = ("QAT004", "QAT015", "QAT023")
    unlike = (*COARSE, "QAT033")
    return [
        Fault(far, MOBILE, "QAT036", "last.0", COARSE, params=study(),
              weights=partial(shift, "two.project.1", "last.0, last.1", 300.0)),
        Fault(far, ATTENTION, "QAT036", "head", COARSE, params=study(),
              weights=partial(shift, "down", "head", 300.0)),
        Fault("an op of few codes among finer ones", BRANCHES, "QAT036", "deep", ("QAT027", *COARSE),
              params={**override("deep", scale=8.0), **study()}),
        Fault("a table of 8 steps", ATTENTION, "QAT037", "gelu", lossy, params=table(division="uniform", entries=8)),
        Fault("a table that ends before its values", ATTENTION, "QAT037", "gelu", lossy,
              params=table(range=[-0.5, 0.5])),
        *each(ALL, "one white image among the others", "QAT038", "", unlike, data={"fault": "one odd"}, late=True,
              params=study(bad_cases=5)),
    ]  # fmt: skip


def training() -> list[Fault]:
    def qat(**changes: Any) -> Params:
        return {"qat": {"epochs": 1, **changes}}

    back = qat(lr=1.0e12, on_nan="rewind", max_rewinds=60)
    blank = ("QAT012", "QAT013", *COARSE, "QAT033")
    return [
        *each((BRANCHES, MOBILE), "a rate of 3", "QAT031", "", params=qat(lr=3.0)),
        *each((BRANCHES, MOBILE), "a rate of 1e12", "QAT028", "", LOSSES, params=back),
        Fault("blank images to validate on", MOBILE, "QAT019", "", blank, data={"fault": "blank"}, late=True),
    ]  # fmt: skip


FAULTS: tuple[Fault, ...] = (
    *float_models(), *calibration(), *ranges(), *formats(), *structure(), *measured(), *training()
)  # fmt: skip
"""Every fault, in the order of the table."""
