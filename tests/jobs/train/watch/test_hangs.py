"""Hung, frozen, lost, slow: who holds everybody up, and who is only late. Time here is pretended."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_ranks import Clock, PretendRun, watched

from tigerbot_jobs.train.watch.beats import Beat
from tigerbot_jobs.train.watch.hangs import Hang, HangWatch
from tigerbot_jobs.train.watch.phase_times import PhaseTimes

PHASES = ("data", "forward", "backward", "step")


class Group:
    """Workers that a test moves by hand. Each beats every quarter second until it is told not to."""

    def __init__(self, *nodes: str) -> None:
        self.clock = Clock()
        self.watch = HangWatch(clock=self.clock)
        self.nodes, self.seq = nodes, [0] * len(nodes)
        self.at = [(0, "data", self.clock.now)] * len(nodes)
        self.cpu, self.uses = [0.0] * len(nodes), [0.0] * len(nodes)
        self.silent: set[int] = set()
        self.keepers: set[str] = set()
        self.watch.new_generation(1, [f"w{rank}" for rank in range(len(nodes))])

    def enter(self, step: int, phase: str, *ranks: int) -> None:
        for rank in ranks or range(len(self.nodes)):
            self.at[rank] = (step, phase, self.clock.now)
            self.seq[rank] += 1

    def wait(self, seconds: float) -> list[Hang]:
        found = []
        for _ in range(round(seconds / 0.25)):
            self.clock.now += 0.25
            for node in self.keepers:
                self.watch.keeper_heard(node)
            for rank, (step, phase, since) in enumerate(self.at):
                if rank not in self.silent:
                    self.cpu[rank] += 0.25 * self.uses[rank]
                    beat = (f"w{rank}", rank, 1, step, phase, self.seq[rank], self.clock.now - since, self.cpu[rank])
                    self.watch.beat(Beat(*beat, node=self.nodes[rank]))
            found += self.watch.check()
        return found

    def train(self, steps: int, phase_s: float = 0.5) -> int:
        for step in range(steps):
            for phase in PHASES:
                self.enter(step, phase)
                assert not self.wait(phase_s)
        return steps


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_hour_of_noisy_running_on_16_ranks_raises_no_alarm(seed: int) -> None:
    run = PretendRun(ranks=16, seed=seed)

    found = watched(run, 3600)

    assert len(run.step_s) > 2500 and max(run.step_s) > 5
    assert not [hang.evidence for _, hang in found]


@pytest.mark.parametrize(("phase", "silent"), [("data", False), ("forward", False), ("forward", True)])
def test_in_the_same_noise_a_rank_that_stops_is_named_in_time(phase: str, silent: bool) -> None:
    took = []
    for seed in range(9):
        run = PretendRun(ranks=8, seed=seed, hang_rank=5, hang_step=150, hang_phase=phase, silent=silent)
        at, hang = watched(run, 260)[0]
        p99_s = sorted(run.step_s[50:150])[-2]
        took.append((at - run.hung_at - 5) / p99_s)
        assert (hang.rank, hang.kind) == (5, "frozen" if silent else "stuck")

    assert statistics.median(took) <= 3 and max(took) <= 5.5


def test_the_rank_that_never_arrived_is_named_while_the_others_wait() -> None:
    group = Group("a", "a", "b", "b")
    step = group.train(20)

    group.enter(step, "data")
    group.wait(0.5)
    group.enter(step, "backward", 0, 1, 3)
    (hang,) = group.wait(15)

    assert (hang.kind, hang.worker, hang.rank, hang.node, hang.phase) == ("stuck", "w2", 2, "b", "data")
    assert "ranks 0, 1, 3 in backward" in hang.evidence


def test_a_rank_that_still_uses_the_cpu_gets_three_times_as_long_and_not_for_ever() -> None:
    group = Group("a", "b")
    step = group.train(20)
    group.enter(step, "forward", 1)
    group.enter(step, "backward", 0)
    group.uses[1] = 0.9

    early, late = group.wait(20), group.wait(10)

    assert not early
    assert late[0].rank == 1 and "though it used the CPU" in late[0].evidence


def test_a_frozen_process_is_told_from_a_lost_node_by_its_neighbours() -> None:
    frozen, lost = Group("a", "a", "b", "b"), Group("a", "a", "b", "b")
    for group, silent in ((frozen, {2}), (lost, {2, 3})):
        group.keepers = {"a", "b"} if group is frozen else {"a"}
        group.watch.keeper_heard("b")
        group.enter(group.train(20), "backward")
        group.silent = silent

    one, both = frozen.wait(6), lost.wait(6)

    assert [(hang.kind, hang.rank) for hang in one] == [("frozen", 2)]
    assert [(hang.kind, hang.rank) for hang in both if hang.rank == 3] == [("node", 3)]


def test_on_a_machine_so_full_that_heartbeats_wait_for_a_core_silence_has_to_be_longer() -> None:
    group = Group("a", "a")
    group.enter(group.train(10, phase_s=4.0), "backward")
    for _ in range(3):  # the widest gap is 4 s by now, and a step takes 16 s
        group.silent = {1}
        assert not group.wait(4)
        group.silent = set()
        assert not group.wait(1)
        group.enter(10, "step")
    group.silent = {1}

    within, after = group.wait(16), group.wait(3)

    assert not within
    assert [(hang.kind, hang.rank) for hang in after] == [("frozen", 1)]


def test_with_a_node_its_last_worker_is_lost_only_when_the_keeper_is_silent_too() -> None:
    with_keeper, without = Group("a", "b"), Group("a", "b")
    with_keeper.keepers = {"a", "b"}
    without.keepers = {"a", "b"}
    for group in (with_keeper, without):
        group.enter(group.train(10), "backward")
        group.silent = {1}
    without.keepers = {"a"}

    frozen, lost = with_keeper.wait(6), without.wait(6)

    assert [hang.kind for hang in frozen] == ["frozen"]
    assert [hang.kind for hang in lost] == ["node"]


def test_nobody_is_named_when_all_stand_in_the_same_collective() -> None:
    group = Group("a", "a", "b", "b")
    group.enter(group.train(20), "backward")

    found = group.wait(30)

    assert [(hang.kind, hang.worker) for hang in found] == [("collective", None)]


def test_storage_that_everybody_waits_for_is_no_ranks_fault() -> None:
    group = Group("a", "a", "b", "b")
    group.enter(group.train(20), "data")

    (hang,) = group.wait(30)

    assert (hang.kind, hang.worker) == ("shared", None)


def test_those_who_wait_for_rank_0_to_save_are_not_accused() -> None:
    group = Group("a", "b", "b")
    step = group.train(20)
    group.enter(step, "save", 0)
    group.enter(step, "agree", 1, 2)

    saving, stuck = group.wait(250), group.wait(100)

    assert not saving  # never seen before: five minutes
    assert [hang.rank for hang in stuck] == [0]


def test_a_driver_that_slept_accuses_nobody() -> None:
    group = Group("a", "b")
    group.enter(group.train(20), "backward")
    group.clock.now += 3600

    found = group.watch.check() + group.wait(2)

    assert not found


def test_when_every_node_is_silent_it_is_our_own_network() -> None:
    group = Group("a", "b")
    group.keepers = {"a", "b"}
    group.train(10)
    group.keepers, group.silent = set(), {0, 1}

    found = group.wait(8)

    assert [(hang.kind, hang.worker) for hang in found] == [("partition", None)]


def test_beats_that_are_lost_while_steps_go_on_are_told_from_a_frozen_process() -> None:
    group = Group("a", "b", "b")
    step = group.train(10)
    group.silent = {2}

    found = []
    for later in range(step, step + 20):
        for phase in PHASES:
            group.enter(later, phase, 0, 1)
            found += group.wait(0.25)

    assert [(hang.kind, hang.rank) for hang in found] == [("unheard", 2)]
    assert found[0].waited_s > 15


def test_the_first_steps_may_compile_for_a_minute() -> None:
    group = Group("a", "b")
    group.enter(0, "forward", 1)
    group.enter(0, "backward", 0)

    assert not group.wait(100)
    assert [hang.rank for hang in group.wait(60)] == [1]


def test_a_survivor_that_does_not_come_to_the_new_generation_is_named() -> None:
    group = Group("a", "b", "c")
    step = group.train(20)
    group.enter(step, "backward")
    group.wait(1)
    group.watch.new_generation(2, ["w0", "w1", "w2"])

    found = []
    for _ in range(280):
        group.clock.now += 0.25
        for rank in (0, 1, 2):
            since, old = group.at[rank][2], rank == 2
            phase, generation, seq = ("backward", 1, group.seq[2]) if old else ("form", 2, 999)
            group.watch.beat(Beat(f"w{rank}", rank, generation, step, phase, seq, group.clock.now - since, 0.0))
        found += group.watch.check()

    assert [(hang.rank, hang.phase) for hang in found][:1] == [(2, "form")]


def test_phases_that_change_for_ever_without_a_step_are_a_hang_too() -> None:
    group = Group("a", "b")
    step = group.train(20)
    group.enter(step, "backward", 0)

    found = []
    for _ in range(400):
        group.enter(step, "data", 1)
        found += group.wait(0.5)
        group.enter(step, "forward", 1)
        group.uses = [1.0, 1.0]
        found += group.wait(0.5)

    assert found and found[0].rank == 1


def test_a_beat_between_the_change_of_a_phase_and_of_its_number_teaches_nothing_wrong() -> None:
    group = Group("a", "b")
    step = group.train(20)
    group.enter(step, "data")
    group.wait(4)
    group.at = [(step, "forward", group.clock.now)] * 2  # the numbers follow a moment later
    group.wait(0.25)

    group.enter(step, "forward")
    group.wait(0.25)

    assert group.watch.times.p99("data") > 3.5 and group.watch.times.p99("forward") < 1


def test_a_hang_is_reported_once_a_minute_and_a_forgotten_worker_never() -> None:
    group = Group("a", "b")
    step = group.train(20)
    group.enter(step, "backward", 0)

    first, again, later = group.wait(10), group.wait(50), group.wait(10)
    group.watch.forget("w1")
    group.enter(step + 1, "data", 0)

    assert [hang.times for hang in first] == [1] and not again and [hang.times for hang in later] == [2]
    assert not group.wait(3)


@given(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=300))
def test_a_deadline_is_the_rule_of_the_last_hundred_steps(seconds: list[float]) -> None:
    times = PhaseTimes()
    for step, took in enumerate(seconds):
        times.add("data", step, took)

    last = sorted(seconds[-100:])
    p99_s = last[-2] if len(last) == 100 else last[-1]
    floor_s = 0.25 if len(last) >= 5 else 60.0
    assert times.deadline_s("data") == pytest.approx(max(floor_s, 5 * p99_s) + 5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_is_within_its_deadline_is_never_reported(data: st.DataObject) -> None:
    group = Group("a", "b", "c")
    step = group.train(8)

    for later in range(step, step + 4):
        for phase in ("data", "forward"):
            for rank in range(3):
                group.enter(later, phase, rank)
            late = data.draw(st.integers(0, 2))
            for rank in {0, 1, 2} - {late}:
                group.enter(later, "backward", rank)
            assert not group.wait(data.draw(st.floats(0, 5.0)))
        group.enter(later, "step")
        assert not group.wait(0.25)


@settings(max_examples=25, deadline=None)
@given(
    culprit=st.integers(0, 3),
    phase=st.sampled_from(["data", "forward", "snapshot"]),
    waits=st.sampled_from(["backward", "step", "agree"]),
)
def test_whoever_stays_behind_is_the_one_that_is_named(culprit: int, phase: str, waits: str) -> None:
    group = Group("a", "a", "b", "b")
    step = group.train(10, phase_s=0.25)

    group.enter(step, phase, culprit)
    group.enter(step, waits, *({0, 1, 2, 3} - {culprit}))
    found = group.wait(70)

    assert {hang.rank for hang in found} == {culprit}
