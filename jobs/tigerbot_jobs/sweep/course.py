"""The course of a sweep: what its journal means. Records in, and out comes what every trial is and what is due next.

A record is written to the journal, then applied here; a driver that takes over applies the journal from its first
record. Scheduler, searcher and population see nothing else, so they are then as they were. What a record makes due (a
rung to be told, a stop, a takeover) is due until its own record follows: a death in between loses nothing.
This module knows no processes and no MLflow.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.population import Exploit, Population
from tigerbot_jobs.sweep.ranking import loss, modes_of, ranked
from tigerbot_jobs.sweep.schedulers import NEVER, MedianStopping, NoScheduler, Rung, Scheduler, SuccessiveHalving
from tigerbot_jobs.sweep.searchers import Outcome, Searcher
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.trials import UNFINISHED, Trial, config_name, index_of, trial_name

Record = dict[str, Any]


@dataclass(frozen=True)
class Due:
    """What has to be told before anything else happens to this trial."""

    trial: str
    rungs: tuple[Rung, ...] = ()
    exploit: Exploit | None = None


class Course:
    """Args:
    searcher, scheduler: fresh ones; they are told everything that is applied.
    """

    def __init__(self, spec: SweepSpec, space: Space, searcher: Searcher, scheduler: Scheduler) -> None:
        self._spec, self._space, self._searcher, self._scheduler = spec, space, searcher, scheduler
        self.trials: dict[str, Trial] = {}
        self.due: dict[str, Due] = {}
        self.reported = False
        self._again: deque[str] = deque()
        self._configs: dict[int, list[Trial]] = {}  # without the fresh ones
        self._searched = 0  # trials, without the fresh ones
        self._proposed: tuple[int, dict[str, Any]] | None = None
        self.counts: Counter[str] = Counter()
        self.best: Trial | None = None
        self._lives: list[list[float]] = []
        self._card_seconds = 0.0

    # What is said of it.

    @property
    def ended(self) -> int:
        return sum(self.counts.values())

    @property
    def wall_s(self) -> float:
        """Over the lives of all drivers."""
        return sum(last - first for first, last in self._lives)

    @property
    def card_hours(self) -> float:
        """Of the attempts that are over."""
        return self._card_seconds / 3600

    def better(self, a: float, b: float) -> bool:
        return a < b if self._spec.mode == "min" else a > b

    def next_decision(self, trial: Trial) -> int:
        return NEVER if trial.fresh else self._scheduler.next_decision(trial.index)

    # What comes next.

    @property
    def more(self) -> bool:
        """Whether there is one to begin."""
        return bool(self._again) or self._searched < self._spec.trials or bool(self._to_confirm())

    def next_trial(self) -> Trial | None:
        """The next one to begin: what was cut short or is to be tried again, new ones, then confirmations.

        A trial that is returned begins: its record follows. None when there is none, or none yet.
        """
        if self._again:
            return self.trials[self._again.popleft()]
        index = len(self.trials)
        if self._searched < self._spec.trials:
            config, seed = divmod(self._searched, self._spec.seeds)
            params = self._params(config)
            return None if params is None else Trial(index, trial_name(index), config, seed, params)
        for config, seed in self._to_confirm()[:1]:
            return Trial(index, trial_name(index), config, seed, self._configs[config][0].params, fresh=True)
        return None

    def again(self, trial: Trial) -> None:
        self._again.append(trial.name)

    def cut_short(self) -> list[Trial]:
        """Of those that had begun, the ones that are not over."""
        return [trial for trial in self.trials.values() if not trial.over]

    def explored(self, exploit: Exploit, trial: Trial) -> dict[str, Any]:
        """The parameters of a takeover."""
        assert isinstance(self._scheduler, Population)
        source = self.trials[trial_name(exploit.source)]
        return self._scheduler.explore(self._space, source.params, trial.index, trial.step, self._spec.params)

    def _to_confirm(self) -> list[tuple[int, int]]:
        """Configurations and fresh seeds that have not begun; none before every other trial is over."""
        confirm = self._spec.confirm
        if confirm is None or self._searched > sum(t.over for t in self.trials.values() if not t.fresh):
            return []
        begun = {(trial.config, trial.seed) for trial in self.trials.values() if trial.fresh}
        top = [trials[0].config for trials in ranked(self.trials.values(), self._spec)[: confirm.top]]
        wanted = [(config, self._spec.seeds + seed) for config in top for seed in range(confirm.seeds)]
        return [one for one in wanted if one not in begun]

    def _params(self, config: int) -> dict[str, Any] | None:
        if config in self._configs:
            return self._configs[config][0].params
        if self._proposed is None or self._proposed[0] != config:
            proposed = self._searcher.propose(config)
            if proposed is None:
                return None
            self._proposed = config, proposed
        return self._proposed[1]

    # What has happened.

    def apply(self, record: Record) -> None:
        """Take in one record of the journal."""
        getattr(self, f"_{record['event']}")(record)
        if self._lives:
            self._lives[-1][1] = max(record["t"], self._lives[-1][1])

    def _open(self, record: Record) -> None:
        self._lives.append([record["t"], record["t"]])

    def _begin(self, record: Record) -> None:
        name = record["name"]
        trial = self.trials.get(name)
        if trial is None:
            config, fresh = int(record["config"][1:]), record["fresh"]
            trial = Trial(index_of(name), name, config, record["seed"], record["params"], fresh)
            self.trials[name] = trial
            if not fresh:
                self._searched += 1
                self._configs.setdefault(config, []).append(trial)
                if len(self._configs[config]) == 1:
                    self._searcher.begun(config, trial.params)
        elif trial.status == "running":
            self._spend(trial, trial.said - trial.began, record["cards"])
        trial.status, trial.attempt, trial.error, trial.cause = "running", record["attempt"], "", ""
        trial.changes, trial.parent, trial.after = record["changes"], None, ""
        trial.began = trial.said = record["t"]
        if record["after"]:
            trial.retried[record["after"]] += 1

    def _point(self, record: Record) -> None:
        trial = self.trials[record["name"]]
        if record["step"] <= trial.step:
            return
        self.reported = True
        trial.step, trial.metric, trial.metrics = record["step"], record["value"], record["metrics"]
        trial.said = record["t"]
        if trial.fresh:
            return
        verdict = self._scheduler.point(trial.index, trial.step, loss(record["value"], self._spec.mode))
        trial.stop = trial.stop or verdict.stop
        exploit = verdict if isinstance(verdict, Exploit) else None
        if verdict.rungs or exploit:
            self.due[trial.name] = Due(trial.name, verdict.rungs, exploit)

    def _rung(self, record: Record) -> None:
        due = self.due.get(record["name"])
        if due is None:
            return
        left = tuple(rung for rung in due.rungs if rung.rung != record["rung"])
        self._still_due(Due(due.trial, left, due.exploit))

    def _exploit(self, record: Record) -> None:
        trial = self.trials[record["name"]]
        trial.params, trial.parent = record["after"], record["from"]
        if (due := self.due.get(trial.name)) is not None:
            self._still_due(Due(due.trial, due.rungs, None))

    def _still_due(self, due: Due) -> None:
        if due.rungs or due.exploit:
            self.due[due.trial] = due
        else:
            self.due.pop(due.trial, None)

    def _end(self, record: Record) -> None:
        trial = self.trials[record["name"]]
        if trial.over:
            return
        self._spend(trial, record["seconds"], record.get("cards", 0.0))
        trial.status, trial.metric = record["status"], record["metric"]
        trial.error, trial.cause = record["error"], record["cause"]
        if trial.cause == UNFINISHED:
            return
        self.counts[trial.status] += 1
        if trial.fresh:
            return
        if trial.status == "done" and trial.metric is not None:
            best = self.best
            if best is None or best.metric is None or self.better(trial.metric, best.metric):
                self.best = trial
        siblings = self._configs[trial.config]
        if len(siblings) == self._spec.seeds and all(sibling.over for sibling in siblings):
            self._searcher.ended(trial.config, self._outcome(siblings))

    def _spend(self, trial: Trial, seconds: float, cards: float) -> None:
        trial.seconds += seconds
        self._card_seconds += seconds * cards

    def _outcome(self, trials: list[Trial]) -> Outcome:
        """Of a configuration: the mean over its seeds that were run to the end; else over those that were stopped."""
        told = [trial for trial in trials if trial.status == "done"]
        told = told or [trial for trial in trials if trial.status == "stopped"]
        modes = modes_of(self._spec)
        whole = [trial for trial in told if all(trial.metrics.get(name) is not None for name in modes)]
        if not whole:
            return Outcome(())
        losses = [sum(loss(trial.metrics[name], mode) for trial in whole) / len(whole) for name, mode in modes.items()]
        return Outcome(tuple(losses), whole[0].status == "stopped", max(trial.step for trial in whole))


def scheduler_of(spec: SweepSpec) -> Scheduler:
    """The scheduler that a spec asks for."""
    how = spec.scheduling
    match spec.scheduler:
        case "asha":
            return SuccessiveHalving(grace=how.grace, reduction=how.reduction)
        case "hyperband":
            return SuccessiveHalving(grace=how.grace, reduction=how.reduction, brackets=how.brackets)
        case "median":
            return MedianStopping(grace=how.grace)
        case "pbt":
            return Population(interval=how.interval, quantile=how.quantile, seed=spec.seed)
    return NoScheduler()


def open_record(spec: SweepSpec, driver: str) -> Record:
    """The record of a driver that begins its life."""
    return {
        "event": "open",
        "driver": driver,
        "trials": spec.trials,
        "metric": spec.metric,
        "mode": spec.mode,
        "searcher": spec.searcher,
        "scheduler": spec.scheduler,
        "price_per_card_hour": spec.budget.price_per_card_hour,
    }


def begin_record(trial: Trial, *, cards: float, node: str) -> Record:
    """The record of a trial that begins, or begins again."""
    return {
        "event": "begin",
        "name": trial.name,
        "params": trial.params,
        "config": config_name(trial.config),
        "seed": trial.seed,
        "fresh": trial.fresh,
        "parent": trial.parent,
        "attempt": trial.attempt + 1,
        "cards": cards,
        "node": node,
        "after": trial.after,
        "changes": trial.changes,
    }
