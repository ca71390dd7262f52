"""The optimizer of QAT: which one is built, over what, at which rate, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from qatlib.errors import ConfigError, TrainingError
from qatlib.fake.epochs import Scores
from qatlib.fake.optimizer import Schedule, check_owned, make_optimizer, parameter_groups
from qatlib.pipeline.config import QatParams
from tests.fake.training import STEPS, batches, start, state, trainer
from tests.models import Tiny

TOTAL = 3 * STEPS


# -- which optimizer ---------------------------------------------------------------------------------------------------


class Signs(torch.optim.Optimizer):
    """Moves every parameter by lr against the sign of its gradient; counts its calls in a group, as some do."""

    def __init__(self, params: Iterable[Any], lr: float, power: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "power": power, "calls": 0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    with torch.no_grad():
                        p -= group["lr"] * p.grad.sign() / group["calls"] ** group["power"]


def no_optimizer(params: Any, lr: float) -> int:
    return 3


@pytest.mark.parametrize(
    ("name", "kwargs", "kind"),
    [
        ("sgd", {"nesterov": True}, torch.optim.SGD),
        ("adamw", {"betas": (0.8, 0.9)}, torch.optim.AdamW),
        ("adam", {}, torch.optim.Adam),
        ("rmsprop", {"alpha": 0.9}, torch.optim.RMSprop),
        ("tests.fake.test_optimizer:Signs", {"power": 0.0}, Signs),
    ],
)
def test_the_optimizer_is_the_one_named(name: str, kwargs: dict[str, Any], kind: type) -> None:
    model = start()
    optimizer = make_optimizer(QatParams(optimizer=name, optimizer_kwargs=kwargs, lr=0.25, weight_decay=0.5), model)
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in kwargs} == kwargs
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(8, 2): 0.5, (3, 8): 0.5, (8,): 0.0, (3,): 0.0}, "biases do not decay"


def test_momentum_is_for_sgd_and_optimizer_kwargs_go_over_it() -> None:
    built = make_optimizer(QatParams(momentum=0.5), start())
    assert built.param_groups[0]["momentum"] == 0.5
    built = make_optimizer(QatParams(momentum=0.5, optimizer_kwargs={"momentum": 0.25}), start())
    assert built.param_groups[0]["momentum"] == 0.25


@pytest.mark.parametrize(
    ("params", "code", "said"),
    [
        ({"optimizer_kwargs": {"nestrov": True}}, "QAT105", "nestrov"),
        ({"optimizer_kwargs": {"momentum": -1.0}}, "QAT105", "Invalid momentum value"),
        ({"optimizer": "torch.optim:Adan"}, "QAT103", "did you mean 'Adam'"),
        ({"optimizer": "tests.fake.test_optimizer:no_optimizer"}, "QAT106", "returned a int"),
    ],
)
def test_what_is_no_optimizer(params: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(ConfigError, match=code) as caught:
        make_optimizer(QatParams(**params), start())
    assert said in str(caught.value)


def test_settings_that_have_a_key_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lr, weight_decay, which .* set qat.lr; set qat.weight_decay"):
        QatParams(optimizer_kwargs={"weight_decay": 0.0, "lr": 1.0})


# -- an optimizer of the caller's --------------------------------------------------------------------------------------


def test_an_optimizer_built_before_prepare_is_refused() -> None:
    net = Tiny()
    mixed = torch.optim.SGD([*net.parameters(), *start().parameters()], lr=0.1)
    with pytest.raises(TrainingError, match=r"QAT193 optimizer SGD: 8 of its 8 parameters"):
        trainer(optimizer=mixed).run()
    model = start()
    half = torch.optim.Adam([*net.parameters(), *model.parameters()], lr=0.1)
    with pytest.raises(TrainingError, match=r"QAT193 optimizer Adam: 4 of its 8 parameters"):
        check_owned(half, model)
    check_owned(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_the_caller_s_optimizer_keeps_its_rates_and_follows_the_schedule() -> None:
    changes = {"schedule": "step", "milestones": (0.5,), "gamma": 0.5, "warmup_steps": 0, "epochs": 2}
    model = start()
    weights, rest = parameter_groups(model, 0.0)
    mine = torch.optim.SGD([{**weights, "lr": 0.2}, {**rest, "lr": 0.02}])
    history = trainer(model, optimizer=mine, **changes).run().history
    assert [row.lr for row in history[1:]] == pytest.approx([0.2, 0.1])
    assert [group["lr"] for group in mine.param_groups] == pytest.approx([0.1, 0.01])


# -- learning rate -----------------------------------------------------------------------------------------------------


def _factors(**changes: Any) -> list[float]:
    schedule = Schedule(QatParams(**changes), TOTAL)
    return [schedule.factor(step) for step in range(TOTAL)]


def test_schedules_in_closed_form() -> None:
    assert _factors(schedule="constant", warmup_steps=0) == [1.0] * TOTAL
    assert _factors(schedule="cosine", warmup_steps=0) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * k / TOTAL)) for k in range(TOTAL)]
    )
    warm = _factors(schedule="cosine", warmup_steps=3)
    assert warm[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert warm[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / (TOTAL - 3))) for k in range(TOTAL - 3)])
    steps = _factors(schedule="step", warmup_steps=0, milestones=(0.5, 0.75), gamma=0.1)
    assert steps == pytest.approx([1.0] * 9 + [0.1] * 5 + [0.01] * 4)


def test_the_schedule_reaches_the_optimizer() -> None:
    one = trainer(schedule="step", milestones=(0.5,), gamma=0.5, warmup_steps=1, epochs=2)
    assert [row.lr for row in one.run().history] == pytest.approx([0.0, 0.05, 0.025])


@pytest.mark.parametrize(("limit", "moved"), [(1e-3, 1e-3), (None, None)])
def test_clipping_bounds_a_step(limit: float | None, moved: float | None) -> None:
    changes = {"momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant", "lr": 1.0, "epochs": 1}
    model = start()
    before = [p.detach().clone() for p in model.parameters()]
    one = trainer(model, clip_grad_norm=limit, batches=lambda e, k: list(batches(e, k))[:1], **changes)
    one.score = lambda _: Scores(0.0, float(one.model.trained))
    one.run()
    length = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True))
    )
    assert length == pytest.approx(moved, rel=1e-3) if moved else length > 0.05


def test_an_entry_point_trains_by_its_own_rule() -> None:
    """One step of :class:`Signs` moves every weight that has a gradient by exactly lr."""
    model = start()
    before = state(model)
    one = trainer(
        model,
        optimizer="tests.fake.test_optimizer:Signs",
        lr=0.125,
        epochs=1,
        warmup_steps=0,
        batches=lambda e, k: list(batches(e, k))[:1],
        score=lambda m: Scores(0.0, float(m.trained)),
    )
    one.run()
    moved = {name: (tensor - before[name]).abs() for name, tensor in state(model).items() if name.endswith("weight")}
    for tensor in moved.values():
        assert set(tensor.flatten().round(decimals=5).tolist()) <= {0.0, 0.125}
        assert float(tensor.max()) == pytest.approx(0.125)
