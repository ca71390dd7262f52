"""The search on a network with one planted bad layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qatlib.analysis.sensitivity import sensitivity
from qatlib.compiler.target import SHIPPED, load_target
from qatlib.errors import QatError
from qatlib.pipeline.config import load_config
from qatlib.pipeline.project import Project
from qatlib.program import Program
from qatlib.tune.attempts import PREDICTED_ON, Attempts
from qatlib.tune.result import Result
from qatlib.tune.search import Search, Settings
from qatlib.tune.space import Option, Space
from qatlib.tune.state import FILE, State
from tests.tune.conftest import Planted

SETTINGS = Settings(images=128)
BAYES = SHIPPED / "bayes-like.yaml"


def run(settings: Settings = SETTINGS, clock: Callable[[], float] = lambda: 0.0, target: str | None = None) -> Result:
    return Search(Project(load_config()), Path("tune"), settings, target, clock=clock).run()


def test_it_finds_16_bits_for_exactly_the_planted_layer(planted: Planted) -> None:
    result = run()
    assert result.present is not None
    assert result.present.ratio is not None
    assert result.present.ratio < 0.9
    best = result.best
    assert best is not None
    assert {name for name, option in best.choice.items() if option.activation == "int16"} == {"a"}
    assert best.ratio is not None
    assert best.ratio >= 0.99
    assert result.left == ""
    kept = [
        (attempt.cost.latency_us, attempt.score.metric) for attempt in result.pareto if attempt.cost and attempt.score
    ]
    assert kept == sorted(kept), "more time for more accuracy"
    assert all(attempt.predicted and attempt.score for attempt in result.attempts)


def test_what_ships_is_one_of_the_choices(planted: Planted) -> None:
    space = Space(Project(load_config()))
    assert space.present() == {"c": Option("int32", "int8")}
    made, ships = space.program(space.present()), Program.load("artifacts/program")
    assert made.ops == ships.ops
    assert made.values == ships.values
    assert made.constants.keys() == ships.constants.keys()
    assert all(torch.equal(made.constants[name], ships.constants[name]) for name in ships.constants)


def test_needless_16_bits_go(planted: Planted) -> None:
    planted.set(qconfig={"default": {"activation": "int16", "weight": "int8"}})
    planted.ship()
    result = run()
    assert result.present is not None
    assert {name for name, o in result.present.choice.items() if o.activation == "int16"} == {
        "x",
        "a",
        "b",
        "avg_pool2d",
    }
    assert result.best is not None
    assert result.best.cost is not None
    assert result.present.cost is not None
    assert result.best.cost.latency_us < result.present.cost.latency_us  # type: ignore[operator]
    assert {name for name, o in result.best.choice.items() if o.activation == "int16"} == {"a"}


class Clock:
    """Ends the time of a run at its ``calls``-th look."""

    def __init__(self, calls: int) -> None:
        self.left = calls + 1  # the first look makes the end

    def __call__(self) -> float:
        self.left -= 1
        return 0.0 if self.left >= 0 else 1e9


def test_without_time_nothing_is_done(planted: Planted) -> None:
    result = run(Settings(budget_s=0.0, images=128), clock=lambda: 0.0)
    assert (result.measured, result.best, result.left) == ([], None, "everything")
    assert not Path("tune", FILE).exists()


def test_many_short_runs_come_to_what_one_long_run_does(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run()
    expected = Path("tune", FILE).read_bytes()
    Path("tune", FILE).unlink()
    done: list[str] = []
    for name in ("cost", "score"):
        monkeypatch.setattr(Attempts, name, _counting(getattr(Attempts, name), done))
    runs = 0
    while (result := run(clock=Clock(3))).left:
        runs += 1
        assert runs < 100
    assert runs > 2
    assert Path("tune", FILE).read_bytes() == expected
    assert result.best is not None
    assert whole.best is not None
    assert result.best.choice == whole.best.choice
    state = State.model_validate_json(expected)
    assert len(done) == len(state.costs) + len(state.scores), "nothing is measured twice"


class Ticking:
    """A second passes from one look to the next."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_what_is_known_in_time_is_used(planted: Planted) -> None:
    result = run(Settings(budget_s=16.0, images=128), clock=Ticking())
    state = State.model_validate_json(Path("tune", FILE).read_bytes())
    assert not state.predicted
    known = {key.split(" of ")[1] for key, trial in state.trials.items() if trial.powers}
    assert known < Space(Project(load_config())).options.keys()
    assert re.fullmatch(
        r"\d+ of \d+ trials, \d+ of \d+ formats to compile(, \d+ of \d+ points to measure)?", result.left
    )
    assert result.attempts
    assert all(attempt.choice.keys() <= known for attempt in result.attempts)
    while (later := run(Settings(budget_s=16.0, images=128), clock=Ticking())).left:
        assert "trials" not in later.left or "trials" in result.left
        result = later
    assert later.best is not None
    assert {name for name, option in later.best.choice.items() if option.activation == "int16"} == {"a"}


def test_trials_are_those_of_the_sensitivity(planted: Planted) -> None:
    project = Project(load_config())
    space = Space(project)
    attempts, state = Attempts(project, space, load_target("bayes-like"), 128), State(fingerprint="")
    attempts.predict(state, lambda: False, lambda: None)
    found, rest = attempts.prediction.noises(state)
    seen = sensitivity(space.model, project.batches("val", PREDICTED_ON, PREDICTED_ON), kinds=("on",))
    for name, parts in found.items():
        for part, noise in parts.items():
            trial = seen.find(name, "on", part)
            assert trial is not None
            assert noise == pytest.approx(trial.distance.noise, rel=1e-9), (name, part)
    others = [trial for trial in seen.ranked("on") if trial.unit.name not in space.options]
    assert found.keys() == space.options.keys()
    assert rest == pytest.approx(sum(trial.distance.noise for trial in others))


def _counting(method: Callable[..., object], done: list[str]) -> Callable[..., object]:
    def counted(*arguments: object) -> object:
        done.append(method.__name__)
        return method(*arguments)

    return counted


def test_a_killed_run_goes_on(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = Attempts.score, 0

    def killed(self: Attempts, choice: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score(self, choice)  # type: ignore[arg-type]

    monkeypatch.setattr(Attempts, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = State.model_validate_json(Path("tune", FILE).read_bytes())
    assert len(kept.scores) == 2
    result = run()
    after = State.model_validate_json(Path("tune", FILE).read_bytes())
    assert kept.scores.items() <= after.scores.items()
    assert calls == len(after.scores) + 1
    assert result.left == ""


def test_other_parameters_start_anew_and_say_so(planted: Planted) -> None:
    run()
    said: list[str] = []
    Search(Project(load_config()), Path("tune"), Settings(images=64), say=said.append)
    assert said == ["parameters, data or model have changed since the last search: it starts anew"]
    said.clear()
    Search(Project(load_config()), Path("tune"), SETTINGS, say=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("sections", "target", "seen"),
    [
        ({}, "bayes-lik", "QAT183 bayes-lik"),
        ({"compile": {"target": "no-linear.yaml"}}, None, "QAT258 target none: refuses the network in int8: QAT184 c"),
        ({"qat": {"hybrid": ["b"]}}, None, "QAT127 artifacts/qat.safetensors: was made with other operators"),
    ],
)
def test_what_cannot_be_searched(planted: Planted, sections: dict[str, object], target: str | None, seen: str) -> None:
    lines = [line for line in BAYES.read_text().splitlines() if not line.startswith("  linear:")]
    Path("no-linear.yaml").write_text("\n".join(lines).replace("name: bayes-like", "name: none"))
    planted.set(**sections)
    with pytest.raises(QatError) as error:
        run(target=target)
    assert str(error.value).startswith(seen)
    assert "\n" not in str(error.value)


def test_fixed_scales_leave_nothing_to_choose(planted: Planted) -> None:
    scales = {"overrides": [{"match": "[abc]", "scale": 0.5}, {"match": "avg_pool2d", "scale": 0.5}]}
    planted.set(qconfig={**scales, "inputs": [{"match": "x", "scale": 0.05}]})
    planted.ship()
    with pytest.raises(QatError, match=r"^QAT255 qconfig: leaves no format to choose"):
        run()


def test_a_state_that_is_none(planted: Planted) -> None:
    Path("tune").mkdir()
    Path("tune", FILE).write_text("{}")
    with pytest.raises(QatError, match=r"^QAT257 tune/state.json: is no state of a search"):
        run()
