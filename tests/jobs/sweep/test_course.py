"""A sweep that is taken over at any record is the sweep it was: schedulers, searchers and populations alike."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.spec import SweepSpec, parse_spec
from tigerbot_jobs.sweep.course import Course, begin_record, scheduler_of
from tigerbot_jobs.sweep.ranking import confirmed, front, ranked
from tigerbot_jobs.sweep.schedulers import MedianStopping, SuccessiveHalving
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.trials import trial_name

SPACE = {
    "lr": {"log_uniform": [1e-5, 1e-1]},
    "width": {"int": [1, 64]},
    "kind": {"choice": ["中", "en", [1, 2]]},
    "extra": {"uniform": [0, 1], "when": {"kind": "en"}},
}


def sweep_spec(**fields: Any) -> SweepSpec:
    raw = {"kind": "sweep", "name": "s", "target": "m:f", "space": SPACE, "trials": 24} | fields
    spec = parse_spec(raw)
    assert isinstance(spec, SweepSpec)
    return spec


def new_course(spec: SweepSpec) -> Course:
    space = Space(spec.space)
    return Course(spec, space, searcher_of(spec, space), scheduler_of(spec))


class Played:
    """A sweep without processes: three trials at once, each reporting in an order that chance decides.

    The journal is what it leaves; a death at any record is a course that has read so much of it.
    """

    def __init__(self, spec: SweepSpec, seed: int) -> None:
        self.spec, self.course, self.chance = spec, new_course(spec), random.Random(seed)
        self.journal: list[dict[str, Any]] = []
        self.running: list[str] = []
        self.clock = 0.0

    def say(self, event: str, **about: Any) -> None:
        self.clock += 1
        record = {"event": event, **about, "t": self.clock}
        self.journal.append(record)
        self.course.apply(record)

    def play(self, records: int) -> None:
        while len(self.journal) < records and self.turn():
            pass

    def turn(self) -> bool:
        while len(self.running) < 3 and (trial := self.course.next_trial()) is not None:
            self.say(**begin_record(trial, cards=1.0, node="n"))
            self.running.append(trial.name)
        if not self.running:
            return False
        trial = self.course.trials[self.chance.choice(self.running)]
        step = trial.step + 1 if trial.step >= 0 else 1
        value = abs(trial.params["lr"] - 0.01) + self.chance.random() / step
        self.say(
            "point", name=trial.name, step=step, value=value, metrics={"loss": value, "size": trial.params["width"]}
        )
        self.settle(trial.name)
        if trial.stop or step == 9:
            status = "stopped" if trial.stop else "done"
            self.say("end", name=trial.name, status=status, metric=value, error="", cause="", seconds=1.0, cards=1.0)
            self.running.remove(trial.name)
        return True

    def settle(self, name: str) -> None:
        due = self.course.due.get(name)
        for rung in due.rungs if due else ():
            self.say("rung", name=name, rung=rung.rung, step=rung.step, value=rung.value, promoted=rung.promoted)
        if due and due.exploit:
            trial = self.course.trials[name]
            after = self.course.explored(due.exploit, trial)
            source = trial_name(due.exploit.source)
            self.say("exploit", name=name, **{"from": source}, step=trial.step, before=trial.params, after=after)


def taken_over(played: Played, at: int) -> Played:
    """The same sweep, whose driver died after so many records."""
    other = Played(played.spec, 0)
    for record in played.journal[:at]:
        other.course.apply(record)
    return other


@pytest.mark.parametrize("searcher", ["random", "quasi", "tpe", "grid"])
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "pbt", "none"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.floats(0, 1))
def test_a_course_that_is_replayed_goes_on_as_the_one_that_lived(
    searcher: str, scheduler: str, seed: int, cut: float
) -> None:
    fields: dict[str, Any] = {"searcher": searcher, "scheduler": scheduler, "seed": seed, "seeds": 1 + seed % 2}
    fields["confirm"] = {"top": 2, "seeds": 2} if seed % 3 == 0 else None
    if searcher == "grid":
        fields["space"] = {"lr": {"choice": [0.1, 0.01, 0.001]}, "width": {"choice": [1, 2, 3, 4]}}
        fields["trials"] = 12
    spec = sweep_spec(**fields)
    lived = Played(spec, seed)
    lived.play(int(cut * 220))

    other = taken_over(lived, len(lived.journal))

    assert other.course.trials == lived.course.trials and other.course.due == lived.course.due
    other.running, other.clock = list(lived.running), lived.clock
    other.chance.setstate(lived.chance.getstate())
    before = len(lived.journal)
    for _ in range(30):
        lived.turn()
        other.turn()
    assert other.journal == lived.journal[before:]


@given(seed=st.integers(0, 10_000), cut=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_what_a_record_made_due_is_still_due_after_a_death(seed: int, cut: float) -> None:
    lived = Played(sweep_spec(scheduler="asha", searcher="random", seed=seed), seed)
    lived.play(150)
    places = [at for at, record in enumerate(lived.journal) if record["event"] == "rung"]
    at = places[int(cut * (len(places) - 1))]

    other = taken_over(lived, at)  # the point is written, its rung is not
    other.settle(lived.journal[at]["name"])

    assert other.journal[0] | {"t": 0} == lived.journal[at] | {"t": 0}


def test_points_that_are_told_twice_count_once() -> None:
    spec = sweep_spec(scheduler="asha", searcher="random")
    course = Played(spec, 1)
    course.play(60)
    point = next(record for record in course.journal if record["event"] == "point")

    before = {name: (trial.step, trial.metric) for name, trial in course.course.trials.items()}
    course.course.apply(point | {"value": -1e9})

    assert before == {name: (trial.step, trial.metric) for name, trial in course.course.trials.items()}


def test_successive_halving_promotes_the_best_third_of_those_that_came() -> None:
    scheduler = SuccessiveHalving(grace=1, reduction=3)

    promoted = [scheduler.point(trial, 1, value).rungs[0].promoted for trial, value in enumerate([5, 6, 4, 7, 3, 9])]

    assert promoted == [True, False, True, False, True, False]
    assert scheduler.next_decision(0) == 3


def test_a_trial_that_jumps_over_rungs_comes_to_each() -> None:
    scheduler = SuccessiveHalving(grace=2, reduction=2)

    verdict = scheduler.point(0, 9, 1.0)

    assert [rung.rung for rung in verdict.rungs] == [0, 1, 2] and not verdict.stop
    assert scheduler.next_decision(0) == 16


def test_hyperband_gives_the_bracket_that_stops_first_the_most_trials() -> None:
    scheduler = SuccessiveHalving(grace=1, reduction=3, brackets=3)

    first = [scheduler.next_decision(trial) for trial in range(13)]

    assert [first.count(step) for step in (1, 3, 9)] == [9, 3, 1]


def test_median_stopping_stops_whose_best_is_worse_than_the_median_of_the_others() -> None:
    scheduler = MedianStopping(grace=2)
    for trial in range(3):
        for step in (1, 2):
            scheduler.point(trial, step, float(trial))

    bad = [scheduler.point(7, step, 5.0).stop for step in (1, 2)]
    good = [scheduler.point(8, step, 0.5).stop for step in (1, 2)]

    assert bad == [False, True] and good == [False, False]


def test_the_pareto_front_holds_what_nothing_is_better_than() -> None:
    spec = sweep_spec(scheduler="none", searcher="tpe", objectives={"size": "min"})
    played = Played(spec, 3)
    played.play(10_000)

    found = {trial.name for trial in front(played.course.trials.values(), spec)}

    points = {t.name: (t.metrics["loss"], t.metrics["size"]) for t in played.course.trials.values()}
    dominated = {a for a, p in points.items() for q in points.values() if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert found == points.keys() - dominated and found


def test_learning_from_earlier_trials_leads_to_where_they_were_good() -> None:
    spec = sweep_spec(searcher="tpe", scheduler="none")
    space = Space(spec.space)
    from tigerbot_jobs.sweep.searchers import Outcome, Random

    drawn = [Random(space, {}, 5).propose(number) or {} for number in range(40)]
    earlier = [(params, Outcome((abs(params["lr"] - 1e-2),))) for params in drawn]
    cold, warm = searcher_of(spec, space), searcher_of(spec, space, earlier)

    def far(searcher: Any) -> float:
        found = [searcher.propose(number)["lr"] for number in range(8)]
        return sorted(abs(lr - 1e-2) for lr in found)[4]

    assert far(warm) < far(cold)


def test_the_best_are_confirmed_with_fresh_seeds_that_nobody_learns_from() -> None:
    spec = sweep_spec(scheduler="asha", searcher="tpe", seeds=2, confirm={"top": 3, "seeds": 4})
    played = Played(spec, 3)
    played.play(10_000)

    begun = [record for record in played.journal if record["event"] == "begin"]
    first = next(at for at, record in enumerate(begun) if record["fresh"])
    trials = played.course.trials.values()
    assert first == 24 and all(record["fresh"] for record in begun[first:]) and len(begun) == 36
    assert {record["seed"] for record in begun[first:]} == {2, 3, 4, 5}
    assert not [r for r in played.journal if r["event"] == "rung" and played.course.trials[r["name"]].fresh]
    assert {group[0].config for group in confirmed(trials, spec)} == {g[0].config for g in ranked(trials, spec)[:3]}


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_little_is_kept_of_a_trial_that_is_over_and_none_of_its_points(searcher: str) -> None:
    sizes = []
    for points in (5, 50):
        course = new_course(sweep_spec(searcher=searcher, trials=10_000))
        play_whole(course, points, trials=20)  # imports, and what is made once
        tracemalloc.start()
        play_whole(course, points, trials=40)
        sizes.append(tracemalloc.get_traced_memory()[0] / 40)
        tracemalloc.stop()

    few, many = sizes
    assert few < 12_000 and many < few + 1_000, f"bytes a trial: {few:.0f}, {many:.0f}"


def play_whole(course: Course, points: int, *, trials: int) -> None:
    """Trials to their ends, one after the other, as a journal of them is applied."""
    for _ in range(trials):
        trial = course.next_trial()
        assert trial is not None
        about = {"name": trial.name, "t": 0.0}
        course.apply(begin_record(trial, cards=1.0, node="n") | {"t": 0.0})
        for step in range(1, points + 1):
            value = trial.params["width"] + 1 / step
            course.apply({"event": "point", "step": step, "value": value, "metrics": {"loss": value}} | about)
            for rung in due.rungs if (due := course.due.get(trial.name)) else ():
                course.apply({"event": "rung", "rung": rung.rung} | about)
        end = {"status": "done", "metric": value, "error": "", "cause": "", "seconds": 1.0}
        course.apply({"event": "end"} | end | about)
