"""What a journal tells, whatever is cut off, broken or said twice in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_story import STEPS, JournalStory

from tigerbot.errors import InputError
from tigerbot_jobs.sweep.analysis import POINT, History
from tigerbot_jobs.sweep.analysis_read import read_history

WHOLE = JournalStory(trials=6, scheduler="asha").asha(6).fresh_seeds(1, 2)


def history(story: JournalStory, folder: Path) -> History:
    return read_history(story.write(folder / "trials.jsonl"))


def test_the_best_hundred_are_known_before_a_point_is_parsed(tmp_path: Path) -> None:
    found = history(JournalStory(trials=300).random_search(300), tmp_path)

    best = found.best(100)

    values = sorted(trial.metric for trial in found.trials.values() if trial.metric is not None)
    assert [trial.metric for trial in best] == values[:100]
    assert "curves" not in vars(found) and found.journal.count(POINT) == 300 * STEPS


def test_where_more_is_better_the_highest_is_best(tmp_path: Path) -> None:
    found = history(JournalStory(mode="max").random_search(20), tmp_path)

    assert found.best(1)[0].metric == max(trial.metric or -math.inf for trial in found.trials.values())


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1))
def test_a_journal_cut_off_anywhere_is_the_history_of_its_whole_lines(tmp_path_factory, share: float) -> None:
    path = WHOLE.write(tmp_path_factory.mktemp("cut") / "trials.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])

    found = read_history(path)

    lines = path.read_bytes().decode(errors="ignore").split("\n")[:-1]
    begun = {event["name"] for event in map(json.loads, lines) if event["event"] == "begin"}
    assert set(found.trials) == begun and found.unreadable == 0
    assert sum(len(curve.steps) for curve in found.curves.values()) == sum('"point"' in line for line in lines)


def test_lines_that_are_none_are_counted_and_cost_nothing_else(tmp_path: Path) -> None:
    path = JournalStory().random_search(5).write(tmp_path / "trials.jsonl")
    whole = read_history(path)
    lines = path.read_text().splitlines()
    lines[3:3] = ["{", "[]", '{"event":"end","name":"nobody","status":"done","t":1}', '{"event":"begin"}', "\x00"]
    lines[1:1] = ['{"event":"point","name":"trial-0000","step":null,"value":1,"t":1}', '{"event":"point"']
    path.write_text("\n".join(lines) + "\n")

    found = read_history(path)

    assert found.unreadable == 5 and found.trials == whole.trials
    assert {name: list(curve.values) for name, curve in found.curves.items()} == {
        name: list(curve.values) for name, curve in whole.curves.items()
    }


def test_the_first_point_of_a_step_stands(tmp_path: Path) -> None:
    story = JournalStory().begin("a", {"lr": 1.0}, config="c0", seed=1, t=1.0)
    story.point("a", 2, 0.5, 3).point("a", 1, 0.9, 2).point("a", 2, 0.1, 9).point("a", 3, math.nan, 10)

    curve = history(story, tmp_path).curves["a"]

    assert list(curve.steps) == [1, 2] and list(curve.values) == [0.9, 0.5]


def test_a_trial_that_failed_and_began_again_is_what_it_became(tmp_path: Path) -> None:
    story = JournalStory().begin("a", {}, config="c0", seed=1, t=0.0)
    story.end("a", "failed", None, seconds=5, t=5, cause="node", error="gone")
    story.begin("a", {}, config="c0", seed=1, t=6.0, attempt=2).end("a", "done", 0.25, seconds=10, t=16)
    story.begin("b", {}, config="c1", seed=1, t=7.0)

    found = history(story, tmp_path)

    first, second = found.trials.values()
    assert (first.status, first.metric, first.seconds, len(first.endings)) == ("done", 0.25, 15, 2)
    assert (second.status, second.metric) == ("running", None) and found.searched == (first,)


def test_no_number_and_a_failure_are_never_the_best(tmp_path: Path) -> None:
    story = JournalStory(mode="max")
    for name, status, metric in (
        ("a", "done", math.nan),
        ("b", "failed", 9.0),
        ("c", "done", math.inf),
        ("d", "stopped", 1.0),
    ):
        story.begin(name, {}, config=name, seed=1, t=0.0).end(name, status, metric, seconds=1, t=1)

    assert [trial.name for trial in history(story, tmp_path).best(10)] == ["d"]


def test_fresh_seeds_have_no_part_in_the_search(tmp_path: Path) -> None:
    found = history(JournalStory(trials=20).random_search(20).fresh_seeds(2, 3), tmp_path)

    assert len(found.trials) == 26 and len(found.searched) == 20
    assert sum(trial.fresh for trial in found.trials.values()) == 6


def test_a_member_of_a_population_is_known_by_what_it_ended_with(tmp_path: Path) -> None:
    story = JournalStory().pbt(members=4, generations=3)

    found = history(story, tmp_path)

    last = [event for event in story.events if event["event"] == "exploit"][-1]
    assert found.trials[last["name"]].params == last["after"]


def test_a_journal_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trials\.jsonl: cannot be read \(no such file or directory\); give a sweep"):
        read_history(tmp_path / "trials.jsonl")
