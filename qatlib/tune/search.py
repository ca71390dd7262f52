"""The search: predict, compile, measure the front from its most promising point on, until the time is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qatlib.compiler import Target, load_target
from qatlib.errors import CompileError, DataError
from qatlib.pipeline.metrics import ratio
from qatlib.pipeline.project import Project
from qatlib.pipeline.stage import fingerprint, lock
from qatlib.tune.attempts import Attempts
from qatlib.tune.front import Choices, Point, non_dominated
from qatlib.tune.result import Attempt, Result
from qatlib.tune.space import SHIPS, Choice, Option, Space, choice_of, key_of
from qatlib.tune.state import Cost, Score, load_state

KEPT = 0.99
"""Share of the float metric that counts as good enough where no goal says more."""
GOAL = "ratio.integer"
_TRIALS, _COMPILATIONS = 0.5, 0.75
"""Of the time that is left, when trials end, and when compilations of single changes do."""


@dataclass(frozen=True)
class Settings:
    """``budget_s`` of this run; ``images`` of the validation split; ``points`` of the predicted front, at most."""

    budget_s: float = 600.0
    images: int = 1000
    points: int = 16
    groups: tuple[str, ...] = ()
    min_ratio: float | None = None


class Search:
    """One search in ``folder``, whose state file it goes on with."""

    def __init__(
        self,
        project: Project,
        folder: Path,
        settings: Settings,
        target: str | None = None,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises as :class:`Space`, CompileError QAT183 for the target, StageError QAT192 or QAT257."""
        self._project, self._folder, self._settings, self._say, self._clock = project, folder, settings, say, clock
        self._end = clock() + settings.budget_s
        name = target or project.config.compile.target
        self._target = load_target(name)
        wide_weights = any("int16" in rule.weights for rule in self._target.ops.values())
        self.space = Space(project, settings.groups, wide_weights)
        self._attempts = Attempts(project, self.space, self._target, settings.images)
        self._state, same = load_state(folder, self._fingerprint(self._target))
        if not same:
            say("parameters, data or model have changed since the last search: it starts anew")

    def _fingerprint(self, target: Target) -> str:
        config = self._project.config
        sections = [config.model, config.data, config.metric, config.qconfig, config.calibrate, config.convert]
        options = {name: [[o.activation, o.weight] for o in found] for name, found in self.space.options.items()}
        compiling = config.compile.options
        return fingerprint(
            sections=[*sections, config.runtime], compile=compiling, hybrid=list(config.qat.hybrid), target=target,
            files=[Path(SHIPS), Path(config.model.checkpoint), Path(config.model.code), Path(config.data.code)],
            settings=[self._settings.images, list(self._settings.groups)], options=options, qatlib=version("qatlib"),
        )  # fmt: skip

    def run(self, measure: bool = True) -> Result:
        """Go on until the time is spent or nothing is left; without ``measure`` the front is predicted only.

        Trials and compilations end when their share of the time is spent: then the front is of what is known, and what
        time its measurements leave goes to the rest of them.

        Raises CompileError QAT258 if the target takes the network in no form, StageError QAT190 if another search
        runs in this working copy.
        """
        with lock("tune"):
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                result = self._round(measure)
                if self._spent() or not result.unpredicted:
                    return result

    def _round(self, measure: bool) -> Result:
        metric, state = self._project.metric(), self._state
        result = Result(self._target.name, metric.name, metric.higher_is_better, state.float_metric, self._goal())
        if state.float_metric is None:
            if self._spent():
                result.left = result.unpredicted = "everything"
                return result
            result.float_metric = state.float_metric = self._attempts.float_metric()
            self._save()
        self._predict(result)
        if key_of({}) not in state.costs or not (choices := self._choices()):
            return result
        present = self.space.present()
        if measure and (self._measured(present) or not self._spent()):
            self._measure(present)
            result.present = self._attempt(present, None)
        front = choices.front(self._settings.points)
        for point in front:
            if not self._costed(point.choice) and not self._spent():
                self._cost(point.choice)
        result.refused = self._refusals()
        self._fill(result, front)
        while measure:
            following = self._next(result, front)
            if following is None:
                if (following := self._between(result, front, choices)) is None:
                    break
                front = non_dominated([*front, following])
            if self._spent() and not self._measured(following.choice):
                count = sum(not self._measured(p.choice) for p in front)
                result.left = ", ".join(
                    filter(None, (result.unpredicted, f"{count} of {len(front)} points to measure"))
                )
                break
            self._measure(following.choice)
            self._fill(result, front)
        return result

    # -- order ---------------------------------------------------------------------------------------------------

    def _next(self, result: Result, front: Sequence[Point]) -> Point | None:
        """The point whose result tells most about where the front passes the goal; then its neighbours."""
        ratios = [a.ratio if a.score else None for a in result.attempts]
        open_ = [i for i, point in enumerate(front) if not self._measured(point.choice) and not self._impossible(point)]
        if not open_:
            return None
        failing = [i for i, kept in enumerate(ratios) if kept is not None and kept < result.min_ratio]
        good = [i for i, kept in enumerate(ratios) if kept is not None and kept >= result.min_ratio]
        low, high = max(failing, default=-1), min(good, default=len(front))
        middle = (low + high) / 2 if low < high else high
        return front[min(open_, key=lambda i: (abs(i - middle), i))]

    def _between(self, result: Result, front: Sequence[Point], choices: Choices) -> Point | None:
        """A new point between the slowest that fails the goal and the next that meets it, None if there is none."""
        meets = [(a.ratio or 0.0) >= result.min_ratio for a in result.attempts]
        for i in range(len(front) - 1, 0, -1):
            if meets[i] and not meets[i - 1] and result.attempts[i - 1].score:
                point = choices.fastest_within(math.sqrt(front[i - 1].noise * front[i].noise))
                known = {key_of(other.choice) for other in front}
                return None if point is None or key_of(point.choice) in known else point
        return None

    def _impossible(self, point: Point) -> bool:
        cost = self._state.costs.get(key_of(point.choice))
        return cost is not None and bool(cost.refused)

    # -- prediction ----------------------------------------------------------------------------------------------

    def _predict(self, result: Result) -> None:
        """Trials, and a compilation of the narrowest choice and of one change of it at a time, the loudest unit first.

        What there is no time for is named in ``result``.
        """
        state, attempts, begin = self._state, self._attempts, self._clock()
        trials, compilations = (begin + share * max(0.0, self._end - begin) for share in (_TRIALS, _COMPILATIONS))
        if not state.predicted:
            attempts.predict(state, lambda: self._clock() >= trials, self._save)
        everything = list(self._single_changes())
        left = [choice for choice in everything if not self._costed(choice)]
        while left and self._clock() < compilations:
            self._cost(left.pop(0))
        self._refuse_nothing()
        missing = (
            (attempts.prediction.missing(state), len(attempts.prediction), "trials"),
            (len(left), len(everything), "formats to compile"),
        )
        result.unpredicted = ", ".join(f"{count} of {whole} {what}" for count, whole, what in missing if count)
        result.left = result.unpredicted

    def _single_changes(self) -> Iterator[dict[str, Option]]:
        """The narrowest choice, and one change of it at a time, where most noise can go first."""
        yield {}
        found, _ = self._attempts.losses(self._state)
        loudest = {name: max(noises.values()) for name, noises in found.items()}
        for name in sorted(self.space.options, key=lambda name: -loudest.get(name, 0.0)):
            yield from ({name: option} for option in self.space.options[name][1:])

    def _choices(self) -> Choices | None:
        """None if no unit was tried."""
        state = self._state
        noises, rest = self._attempts.losses(state)
        if not noises:
            return None
        base = state.costs[key_of({})].latency_us
        assert base is not None
        latencies: dict[str, dict[Option, float]] = {}
        for name in noises:
            narrowest, *others = self.space.options[name]
            latencies[name] = {narrowest: 0.0}
            for option in others:
                cost = state.costs.get(key_of({name: option}))
                if cost is not None and cost.latency_us is not None:
                    latencies[name][option] = cost.latency_us - base
        return Choices(noises, latencies, base, rest)

    def _refuse_nothing(self) -> None:
        narrowest = self._state.costs.get(key_of({}))
        if why := narrowest.refused if narrowest else "":
            fix = "Change what it names; qatlib check target lists all of it"
            raise CompileError("QAT258", f"target {self._target.name}", f"refuses the network in int8: {why}", fix)

    def _refusals(self) -> dict[str, str]:
        """Why a unit cannot have an option, by both."""
        found = {}
        for key, cost in self._state.costs.items():
            choice = choice_of(key)
            if cost.refused and len(choice) == 1:
                found.update({f"{name} {option}": cost.refused for name, option in choice.items()})
        return found

    # -- measurements --------------------------------------------------------------------------------------------

    def _costed(self, choice: Choice) -> bool:
        return key_of(choice) in self._state.costs

    def _measured(self, choice: Choice) -> bool:
        return key_of(choice) in self._state.scores

    def _cost(self, choice: Choice) -> Cost:
        key = key_of(choice)
        if key not in self._state.costs:
            self._state.costs[key] = self._attempts.cost(choice)
            self._save()
        return self._state.costs[key]

    def _measure(self, choice: Choice) -> None:
        if self._cost(choice).refused or self._measured(choice):
            return
        score = self._attempts.score(choice)
        self._state.scores[key_of(choice)] = score
        self._save()
        cost = self._state.costs[key_of(choice)]
        self._say(f"measured: {cost.latency_us:.2f} µs, {score.metric:.4f}, {len(choice)} units above int8")

    def _fill(self, result: Result, front: Sequence[Point]) -> None:
        result.attempts = [self._attempt(point.choice, point) for point in front]

    def _attempt(self, choice: Choice, predicted: Point | None) -> Attempt:
        key = key_of(choice)
        score = self._state.scores.get(key)
        return Attempt(choice, predicted, self._state.costs.get(key), score, self._kept(score))

    def _kept(self, score: Score | None) -> float | None:
        """Ratio to the float metric, None where it is undefined."""
        if score is None or self._state.float_metric is None:
            return None
        try:
            return ratio(score.metric, self._state.float_metric, self._project.metric().higher_is_better)
        except DataError:
            return None

    def _goal(self) -> float:
        if self._settings.min_ratio is not None:
            return self._settings.min_ratio
        asked = [goal.min for goal in self._project.config.goals if goal.metric == GOAL and goal.min is not None]
        return max(asked, default=KEPT)

    def _spent(self) -> bool:
        return self._clock() >= self._end

    def _save(self) -> None:
        self._state.save(self._folder)
