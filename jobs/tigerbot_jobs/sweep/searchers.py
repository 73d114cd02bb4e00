"""Which point comes next. Configurations are numbered; a searcher is told what was begun and what came of it.

Random, grid and quasi-random points are functions of (seed, number). Optuna's TPE also depends on what it was told: it
draws with a generator of (seed, number) from a study that is rebuilt by telling it the same again, in the same order.
So the same journal gives the same next point, whichever process asks. Values are losses: lower is better.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.space import Dimension, Space

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of a configuration. `losses` is empty where nothing did; `step` is where a stopped one was."""

    losses: tuple[float, ...]
    stopped: bool = False
    step: int = 0


class Searcher(Protocol):
    def propose(self, number: int) -> dict[str, Any] | None:
        """The configuration of this number; None where there is no more."""
        ...

    def begun(self, number: int, params: Params) -> None:
        """It was begun, by this process or an earlier one."""
        ...

    def ended(self, number: int, outcome: Outcome) -> None: ...


def searcher_of(spec: SweepSpec, space: Space, earlier: Sequence[tuple[Params, Outcome]] = ()) -> Searcher:
    """The searcher a spec asks for; `earlier` are configurations of other sweeps, for those that learn."""
    if spec.searcher == "grid":
        return Grid(space.grid(spec.params))
    if spec.searcher == "tpe":
        return Tpe(space, spec.params, spec.seed, _startup(spec), 1 + len(spec.objectives), earlier)
    draws = {"random": Random, "quasi": QuasiRandom}
    return draws[spec.searcher](space, spec.params, spec.seed)


class _Untold:
    """A searcher that learns nothing."""

    def begun(self, number: int, params: Params) -> None:
        pass

    def ended(self, number: int, outcome: Outcome) -> None:
        pass


class Random(_Untold):
    def __init__(self, space: Space, fixed: Params, seed: int) -> None:
        self._space, self._fixed, self._seed = space, fixed, seed

    def propose(self, number: int) -> dict[str, Any] | None:
        chance = random.Random(f"{self._seed}/{number}")
        return self._space.at([chance.random() for _ in self._space.dimensions], self._fixed)


class QuasiRandom(_Untold):
    """A scrambled Sobol sequence (what Optuna's QMC sampler draws from, which keeps its place in the study instead)."""

    def __init__(self, space: Space, fixed: Params, seed: int) -> None:
        self._space, self._fixed, self._seed = space, fixed, seed
        self._at = 0

    @cached_property
    def _sequence(self) -> Any:
        from scipy.stats import qmc

        return qmc.Sobol(len(self._space.dimensions), scramble=True, rng=self._seed)

    def propose(self, number: int) -> dict[str, Any] | None:
        if number < self._at:
            self._sequence.reset()
            self._at = 0
        if number > self._at:
            self._sequence.fast_forward(number - self._at)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # balanced only at powers of two, which sweeps seldom are
            place = self._sequence.random(1)[0]
        self._at = number + 1
        return self._space.at([float(unit) for unit in place], self._fixed)


class Grid(_Untold):
    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        self.points = points

    def propose(self, number: int) -> dict[str, Any] | None:
        return dict(self.points[number]) if number < len(self.points) else None


class Tpe:
    """Optuna's tree-structured Parzen estimator over a study in memory; several losses make a Pareto front."""

    def __init__(
        self,
        space: Space,
        fixed: Params,
        seed: int,
        startup: int,
        objectives: int = 1,
        earlier: Sequence[tuple[Params, Outcome]] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._fixed, self._seed, self._startup = space, fixed, seed, startup
        self._study = optuna.create_study(directions=[optuna.study.StudyDirection.MINIMIZE] * objectives)
        self._trials: dict[int, Any] = {}
        for params, outcome in earlier:
            self._begin(params).report_and_tell(outcome)

    def propose(self, number: int) -> dict[str, Any] | None:
        import optuna

        draw = int.from_bytes(hashlib.sha256(f"{self._seed}/{number}".encode()).digest()[:4], "big")
        self._study.sampler = optuna.samplers.TPESampler(seed=draw, n_startup_trials=self._startup)
        trial = self._study.ask()
        params = self._space.draw(lambda dimension: _suggested(trial, dimension), self._fixed)
        self._trials[number] = _Asked(self._study, trial)
        return params

    def begun(self, number: int, params: Params) -> None:
        if number not in self._trials:
            self._trials[number] = self._begin(params)

    def ended(self, number: int, outcome: Outcome) -> None:
        self._trials.pop(number).report_and_tell(outcome)

    def _begin(self, params: Params) -> _Asked:
        """A trial with these parameters, as if they had been drawn."""
        import optuna

        self._study.sampler = optuna.samplers.RandomSampler(seed=0)
        held = {d.name: d for d in self._space.dimensions if d.name in params}
        wanted = {n: d.place(params[n]) if d.kind == "choice" else params[n] for n, d in held.items()}
        self._study.enqueue_trial(wanted)
        trial = self._study.ask()
        for dimension in self._space.dimensions:
            if dimension.name in held:
                _suggested(trial, dimension)
        return _Asked(self._study, trial)


@dataclass(frozen=True)
class _Asked:
    study: Any
    trial: Any

    def report_and_tell(self, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        if not outcome.losses:
            self.study.tell(self.trial, state=TrialState.FAIL)
        elif outcome.stopped and len(outcome.losses) == 1:
            self.trial.report(outcome.losses[0], outcome.step)
            self.study.tell(self.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(self.trial, list(outcome.losses))


def _suggested(trial: Any, dimension: Dimension) -> Any:
    if dimension.kind == "choice":  # by place: Optuna's own choices are plain values only
        return dimension.values[trial.suggest_categorical(dimension.name, range(len(dimension.values)))]
    low, high = dimension.values
    suggest = trial.suggest_int if dimension.kind.endswith("int") else trial.suggest_float
    return suggest(dimension.name, low, high, log=dimension.kind.startswith("log"))


def _startup(spec: SweepSpec) -> int:
    """Random points before the first that is learned."""
    return min(10, max(4, spec.trials // spec.seeds // 3))
