"""The loop of a sweep: hand out trials, write down what they say, answer, until nothing is left or affordable.

It owns the order of things: a record is written to the journal, applied to the course, then said to MLflow; an answer
goes out last. So whatever a trial or MLflow knows, a driver that takes over knows too.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tigerbot.errors import ClusterError, SpecError, TigerError
from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.budget import Purse
from tigerbot_jobs.sweep.checkpoints import Checkpoints
from tigerbot_jobs.sweep.course import Course, Record, begin_record, open_record
from tigerbot_jobs.sweep.crew import Crew, Lost
from tigerbot_jobs.sweep.failures import Cause, SameFailure, is_retried
from tigerbot_jobs.sweep.follow import SAID_AGAIN, Follow
from tigerbot_jobs.sweep.journal import Journal, finite
from tigerbot_jobs.sweep.noticed import Noticed
from tigerbot_jobs.sweep.population import Exploit
from tigerbot_jobs.sweep.states import States
from tigerbot_jobs.sweep.trials import Trial, trial_name
from tigerbot_jobs.sweep.worker import Answer, Ended, Event, Kept, Point, Task

_WAIT_S = 0.5
_LOOK_S = 10.0  # between two looks at the cluster's size


class Driver:
    """One driver's life.

    Args:
        course: told everything the journal holds by `restore`.
        states: what trials kept.
        shrink: the changes that make a trial's memory smaller; nothing where there are none.
        listen: told every record of the journal, the old ones too.
        on_end: told after every end, for the terminal.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: Path,
        *,
        course: Course,
        journal: Journal,
        follow: Follow,
        crew: Crew,
        states: States | Checkpoints,
        shrink: Callable[[dict[str, Any]], dict[str, Any]],
        listen: Callable[[Record], None],
        on_end: Callable[[], None],
    ) -> None:
        self._spec, self._folder, self._course, self._journal = spec, folder, course, journal
        self._follow, self._crew, self._shrink, self._states = follow, crew, shrink, states
        self._listen, self._on_end = listen, on_end
        self._purse = Purse(spec, course)
        self._alike = SameFailure(spec.same_failures)
        self._runs: dict[int, Trial] = {}  # of every worker that runs one
        self._idle: list[int] = []
        self._noticed = Noticed(spec.metric, spec.objectives)
        self._wanted, self._looked, self._hired, self._early_deaths = 0, -math.inf, False, 0

    def restore(self) -> None:
        """Apply the journal, then do what its last driver had not done yet."""
        last: deque[Record] = deque(maxlen=SAID_AGAIN)
        for record in self._journal.records():
            self._course.apply(record)
            self._listen(record)
            last.append(record)
        self._follow.say_again(list(last), self._course.trials)
        self._say(**open_record(self._spec, self._journal.driver))
        for trial in self._course.cut_short():
            if trial.stop or trial.name in self._course.due:
                self._follow.begin(trial)
            self._settle(trial)
            self._states.take(trial.name)
            if trial.stop:
                self._end(trial, "stopped", seconds=trial.said - trial.began)
            else:
                self._course.again(trial)

    def run(self) -> str:
        """Until the end; what of the budget was used up, if that was it.

        Raises:
            TigerError: no trial can be run, or the first ones all failed alike.
        """
        try:
            while self._runs or self._course.more:
                if spent := self._purse.spent():
                    self._stop_all(spent)
                    return spent
                self._hire()
                self._hand_out()
                for worker, heard in self._crew.heard(_WAIT_S):
                    self._hear(worker, heard)
                self._enforce_deadline()
            return ""
        finally:
            self._follow.leave()
            self._crew.close()

    # Handing out.

    def _hire(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S and len(self._crew) >= self._wanted:
            return
        self._looked, slots = now, self._crew.slots()
        self._wanted = min(self._spec.max_concurrent, slots, self._spec.trials)
        if slots < 1 and not self._crew:
            if not self._hired:
                where = f"{self._spec.name}: {self._spec.cpus_per_trial:g} CPUs, {self._spec.gpus_per_trial:g} GPUs"
                raise ClusterError("the cluster holds no such trial", where=where, fix="ask for less, or add a node")
            time.sleep(_WAIT_S)  # every node is lost: others may come
            return
        if slots < self._spec.max_concurrent and not self._crew:
            print(f"  the cluster holds {slots} trials at once, not {self._spec.max_concurrent}", flush=True)
        while len(self._crew) < self._wanted:
            self._hired = True
            self._idle.append(self._crew.hire())

    def _hand_out(self) -> None:
        ready = set(self._crew.ready)
        for worker in [worker for worker in self._idle if worker in ready]:
            trial = self._course.next_trial()
            if trial is None:
                return
            self._idle.remove(worker)
            self._begin(worker, trial)

    def _begin(self, worker: int, trial: Trial) -> None:
        self._say(**begin_record(trial, cards=self._purse.cards, node=self._crew.node(worker)[:12]))
        trial = self._course.trials[trial.name]
        self._follow.begin(trial)
        task = Task(
            name=trial.name,
            params=trial.params | trial.changes,
            seed=trial.seed,
            metric=self._spec.metric,
            state=self._states.read(trial.name),
            decide_at=self._course.next_decision(trial),
            output=self._folder / "output" / f"{trial.name}.txt",
        )
        self._runs[worker] = trial
        self._purse.begin(trial.name)
        self._crew.send(worker, task)

    # Hearing.

    def _hear(self, worker: int, heard: list[Event] | Lost) -> None:
        if isinstance(heard, Lost):
            self._lost(worker, heard)
            return
        self._early_deaths = 0
        for event in heard:
            trial = self._runs[worker]
            if isinstance(event, Point):
                self._point(worker, trial, event)
            elif isinstance(event, Kept):
                self._states.write(trial.name, event.state)
            else:
                self._ended(worker, trial, event)

    def _point(self, worker: int, trial: Trial, point: Point) -> None:
        value = point.metrics.get(self._spec.metric)
        self._noticed.metrics(point.metrics)
        if value is not None and not math.isfinite(value):
            self._follow.point(trial.name, point.step, point.metrics)
            self._end(trial, "failed", f"{self._spec.metric} is {value} at step {point.step}", "nan")
            self._crew.send(worker, Answer(go_on=False))
            return
        at = None
        if value is not None and point.step > trial.step and not trial.over:
            about = {"step": point.step, "value": value, "metrics": finite(point.metrics)}
            at = self._say("point", name=trial.name, **about)["t"]
        self._follow.point(trial.name, point.step, point.metrics, at)
        self._settle(trial)
        if point.waits:
            go_on = not trial.stop and trial.parent is None
            self._crew.send(worker, Answer(go_on, self._course.next_decision(trial)))

    def _settle(self, trial: Trial) -> None:
        """Write down what a point has made due."""
        due = self._course.due.get(trial.name)
        if due is None:
            return
        for rung in due.rungs:
            about = {"step": rung.step, "value": trial.metric, "promoted": rung.promoted}
            self._say("rung", name=trial.name, rung=rung.rung, **about)
        if due.exploit is not None:
            self._take_over(trial, due.exploit)

    def _take_over(self, trial: Trial, exploit: Exploit) -> None:
        """A member's state becomes another's, before it is written down that it has."""
        source, before = trial_name(exploit.source), trial.params
        if not self._states.stage(source, trial.name):
            raise SpecError(
                "a population wants a target that keeps its state",
                where=f"target {self._spec.target}",
                fix="call report.keep(bytes) after report(...), and begin from report.kept",
            )
        after = self._course.explored(exploit, trial)
        self._say("exploit", name=trial.name, **{"from": source}, step=trial.step, before=before, after=after)
        self._states.take(trial.name)
        self._follow.exploit(trial.name, source, trial.step, after)

    def _ended(self, worker: int, trial: Trial, ended: Ended) -> None:
        self._noticed.backwards(trial.name, ended.backwards)
        del self._runs[worker]
        self._idle.append(worker)
        if trial.over:
            return
        if trial.parent is not None:
            self._again(trial)
        elif ended.error:
            self._failed(trial, ended.error, ended.cause)
        elif ended.stopped:
            self._end(trial, "stopped")
        elif trial.metric is None:
            self._noticed.ended_without(trial.name, anybody=self._course.reported)
            self._end(trial, "failed", f"ended without reporting {self._spec.metric}", "bug")
        else:
            self._noticed.ended(trial, self._course.trials.values())
            self._end(trial, "done")

    def _lost(self, worker: int, lost: Lost) -> None:
        trial = self._runs.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        self._looked = -math.inf
        if trial is not None:
            if not trial.over:
                self._failed(trial, lost.error, lost.cause)
            return
        self._early_deaths += 1
        if self._early_deaths >= 3 or lost.cause == "bug":
            raise ClusterError(f"no worker starts ({lost.error})", where=self._spec.name, fix="Ray's logs say more")

    def _failed(self, trial: Trial, error: str, cause: Cause) -> None:
        shrunk = self._shrink(trial.params | trial.changes) if cause == "memory" else {}
        if not is_retried(cause, trial.retried, can_shrink=bool(shrunk)):
            self._end(trial, "failed", error, cause)
            return
        print(f"  {trial.name} begins again ({cause}: {error[:120]})", flush=True)
        trial.after, trial.changes = cause, trial.changes | shrunk
        self._again(trial)

    def _again(self, trial: Trial) -> None:
        self._purse.end(trial.name)  # it may wait long, for a node: that costs nothing
        self._course.again(trial)

    def _end(
        self, trial: Trial, status: str, error: str = "", cause: Cause = "", *, seconds: float | None = None
    ) -> None:
        if seconds is None:
            seconds = self._purse.end(trial.name)
        metric = None if status == "failed" else trial.metric
        about = {"status": status, "metric": metric, "error": error, "cause": cause, "cards": self._purse.cards}
        self._say("end", name=trial.name, **about, seconds=round(seconds, 3))
        self._follow.end(trial)
        if trial.over and self._spec.scheduler != "pbt":  # of a population, the others may take over from it
            self._states.forget(trial.name)
        self._on_end()
        if cause != "nan" and self._alike.ended(status, error):  # a loss that is none is the point's, not the target's
            raise TigerError(
                f"the first {self._alike.count} trials all failed alike: {error}",
                where=f"{self._spec.name}, {self._folder / 'output' / trial.name}.txt",
                fix="correct the target and run it again, or --replace to begin anew",
            )

    # Ending.

    def _enforce_deadline(self) -> None:
        for worker, trial in list(self._runs.items()):
            if self._purse.is_overdue(trial.name):
                self._crew.dismiss(worker)
                del self._runs[worker]
                self._looked = -math.inf
                self._end(trial, "killed", f"was not done after {self._spec.deadline_s:g} s", "deadline")

    def _stop_all(self, spent: str) -> None:
        for worker, trial in list(self._runs.items()):
            self._crew.dismiss(worker)
            if not trial.over:
                self._end(trial, "killed", f"the budget is spent: {spent}", "budget")
        self._runs.clear()

    def _say(self, event: str, **about: Any) -> Record:
        record = self._journal.write(event, **about)
        self._course.apply(record)
        self._listen(record)
        return record
