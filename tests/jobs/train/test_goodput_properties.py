"""Whatever happens to a run, its seconds add up: random histories, written by the real writer and cut at any byte."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_story import Story

from tigerbot_jobs.train.goodput import Account, account, as_metrics
from tigerbot_jobs.train.goodput_page import page
from tigerbot_jobs.train.goodput_text import as_json, table
from tigerbot_jobs.train.ledger import read_events
from tigerbot_jobs.train.measured import measured
from tigerbot_jobs.train.timeline import CATEGORIES

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of ledgers, each synchronised
FAULTS = [
    "process", "hang", "node", "partition", "exception", "straggler", "nan", "spike", "corruption", "preemption", "storage",
]  # fmt: skip
ACTIONS = ["replace", "shrink", "grow", "rollback", "skip", "kill", "quarantine", "restart", "stop", "persist", "wait"]
KINDS = [
    "driver_started", "scheduled", "generation", "group_formed", "restored", "steps", "fault_seen", "decision", "rollback",
    "stopped", "persisted", "gap", "ended", "take",
]  # fmt: skip
seconds = st.floats(0, 30, allow_nan=False)
part = st.floats(0, 0.4)

steps = st.tuples(
    st.just("steps"), st.integers(1, 30), st.floats(0.001, 5), part, part, st.booleans(), st.integers(1, 6)
)
fault = st.tuples(st.just("fault"), st.sampled_from(FAULTS), st.integers(-1, 3), seconds)
recovery = st.tuples(
    st.just("recovery"), st.sampled_from(ACTIONS), st.integers(0, 20), st.integers(1, 4), seconds,
    st.sampled_from(["fault", "grow", "rollback", "straggler", "preemption"]),
)  # fmt: skip
killed = st.tuples(st.just("killed"), seconds, seconds)
stopped = st.tuples(st.just("stopped"), st.sampled_from(["failed", "killed"]), seconds)
noise = st.tuples(st.just("noise"), st.sampled_from(["persisted", "scheduled", "group_formed", "unheard_of"]), seconds)
histories = st.lists(st.one_of(steps, steps, steps, fault, recovery, killed, stopped, noise), max_size=25)


def play(story: Story, acts: list[tuple]) -> None:
    """Let it happen. Steps are reported in batches, the last ones of a batch after what interrupted them."""
    story.ready()
    for act in acts:
        match act:
            case ("steps", count, each, data, snapshot, late, batch):
                rows = []
                for _ in range(count):
                    story.step += 1
                    story.wait(each)
                    rows.append([story.step, each, each * data, each * snapshot, 0.0, 0.0, 100])
                    if len(rows) == batch:
                        story.write("steps", generation=story.generation, world_size=story.world_size, rows=rows)
                        rows = []
                story.wait(0.05)
                if late:
                    story.fault("hang")
                if rows:
                    story.write("steps", generation=story.generation, world_size=story.world_size, rows=rows)
            case ("fault", kind, rank, after):
                story.wait(after).fault(kind, rank=rank)
            case ("recovery", action, back, size, after, reason):
                story.decide(action).wait(after)
                story.step = max(0, story.step - back)
                story.group(reason, size=size, restore=after / 2)
            case ("killed", before, after):
                story.wait(before).close()
                story.wait(after).ready(tier="memory", queue=after)
            case ("stopped", reason, after):
                story.write("stopped", reason=reason).wait(after).ready(tier="storage")
            case ("noise", kind, after):
                story.wait(after).write(kind)


def check(found: Account, wall_s: float) -> None:
    assert found.wall_s == pytest.approx(wall_s, abs=1e-3)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=0.005, abs=1e-6)
    assert set(found.seconds) == set(CATEGORIES) and min(found.seconds.values()) >= -1e-9
    at = 0.0
    for span in found.timeline.spans():
        assert span.start == pytest.approx(at, abs=1e-6)
        assert sum(length for _, length in span.shares) == pytest.approx(span.end - span.start, abs=1e-6)
        at = span.end
    assert at == pytest.approx(found.wall_s, abs=1e-6)
    assert 0 <= found.goodput <= 1 + 1e-9 and 0 <= found.goodput_throughput <= 1
    useful = [turn.step for turn in sorted(found.timeline.turns, key=lambda t: t.step) if not turn.undone]
    assert len(useful) == len(set(useful)) == found.steps
    for loss in found.losses:
        assert loss.total_s <= found.wall_s + 1e-6
        assert loss.incident.mttr_s is None or loss.incident.mttr_s >= 0
    shown = [*table(found, "died"), page(found, "died", []), json.dumps(as_json(found, "died"), allow_nan=False)]
    assert len(shown) > 5
    assert all(math.isfinite(value) for value in as_metrics(found).values()) and measured(found).wall_s >= 0


@settings(max_examples=100, deadline=None)
@given(acts=histories, cut=st.floats(0, 1))
def test_seconds_sum_to_wall_time_whenever_the_driver_is_killed(acts: list[tuple], cut: float) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        story = Story(Path(folder))
        play(story, acts)
        story.close()
        os.truncate(story.path, int(cut * story.path.stat().st_size))

        events = [event for event in read_events(story.path) if event.kind != "ledger"]

        check(account(events), events[-1].t - events[0].t if events else 0.0)


@settings(max_examples=60, deadline=None)
@given(acts=histories)
def test_every_reported_step_is_either_useful_or_undone_and_lasts_as_long_as_it_was_measured(acts: list[tuple]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        story = Story(Path(folder))
        play(story, acts)
        story.close()
        events = read_events(story.path)
        rows = [row for event in events for row in event.items("rows")]

        found = account(events)

        assert found.steps + found.undone_steps == len(rows)
        turns = sum(turn.end - turn.start for turn in found.timeline.turns)
        assert turns == pytest.approx(sum(row[1] for row in rows), rel=0.005, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "kind": st.sampled_from(KINDS),
                "m": st.floats(-100, 100),
                "t": st.floats(-100, 100),
                "driver": st.sampled_from(["a", "b", "c"]),
            },
            optional={
                "generation": st.integers(-1, 3),
                "step": st.one_of(st.integers(), st.integers(-5, 50), st.text(max_size=2), st.none()),
                "to_step": st.integers(-5, 50),
                "reason": st.sampled_from(["start", "fault", "grow", "done", "killed", ""]),
                "fault": st.sampled_from([*FAULTS, "", "new"]),
                "action": st.sampled_from(ACTIONS),
                "world_size": st.integers(-1, 4),
                "workers": st.one_of(st.none(), st.lists(st.one_of(st.integers(0, 4), st.none()), max_size=3)),
                "rows": st.lists(
                    st.one_of(
                        st.none(), st.lists(st.one_of(st.floats(), st.none(), st.integers()), min_size=5, max_size=9)
                    ),
                    max_size=4,
                ),
            },
        ),
        max_size=40,
    )
)
def test_nonsense_in_any_order_still_adds_up(raw: list[dict]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "ledger.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in raw))
        found = account(read_events(path))

    check(found, found.wall_s)
