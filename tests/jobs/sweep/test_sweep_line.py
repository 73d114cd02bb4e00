"""The one line that says how a sweep goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from journal_story import JournalStory

from tigerbot_jobs.sweep.page_line import Limits, Progress, Tally, line, note, progress, time_left_s

GOING = Progress(
    metric="loss",
    planned=3000,
    ended=412,
    failed=3,
    running=((1000.0, 2.0), (1030.0, 2.0)),
    best=(1.23456, "trial-0231"),
    ends=tuple(1000.0 + 5 * index for index in range(13)),
    opened=900.0,
    worked_s=0.0,
    card_s=3500.0,
    price=2.0,
)


def test_the_line_says_trials_rate_best_and_what_is_left() -> None:
    said = line(GOING, Limits(money=20.0), now=1060.0)

    assert said == (
        "412/3,000 trials, 2 h 14 min left; 2 running, 3 failed, 12/min, best loss 1.2346 (trial-0231), "
        "17.96 of 20.00 money left"
    )


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (Limits(), (3000 - 412) * 5),
        (Limits(hours=1), 3600 - 160),
        (Limits(card_hours=1.1), (1.1 * 3600 - 3680) / 4),
        (Limits(money=2.2), (1.1 * 3600 - 3680) / 4),
        (Limits(card_hours=1), 0),
        (Limits(hours=1, card_hours=1.05), (1.05 * 3600 - 3680) / 4),
    ],
)
def test_the_time_left_is_that_of_what_is_used_up_first(limits: Limits, left: float) -> None:
    assert time_left_s(GOING, limits, now=1060.0) == pytest.approx(left)


def test_before_anything_has_ended_nothing_is_promised() -> None:
    young = replace(GOING, ended=0, failed=0, best=None, ends=(), price=None)

    assert line(young, Limits(), now=1060.0) == "0/3,000 trials; 2 running"


def test_names_from_outside_cannot_move_the_cursor() -> None:
    odd = replace(GOING, metric="\x1b[2Jloss\n", best=(1.0, "a\rb"))

    assert not {"\x1b", "\n", "\r"} & set(note(odd, Limits(), now=1060.0))


def test_a_tally_of_events_one_by_one_is_that_of_all_of_them() -> None:
    events = JournalStory(trials=40).random_search(30).events
    tally = Tally()
    for event in events:
        tally.take(event)

    found = tally.progress()

    assert found == progress(events) and (found.ended, found.planned, found.running) == (30, 40, ())
    assert found.card_hours(0) == pytest.approx(30 * 60 / 3600) and found.best is not None
    assert found.best[0] == min(event["metric"] for event in events if event["event"] == "end")


def test_another_life_counts_its_own_rate_and_all_the_hours() -> None:
    story = JournalStory(trials=40).random_search(8)
    story.begin("cut", {}, config="c", seed=1, t=1.7e9 + 150)
    before = progress(story.events)
    story.open("feedbeef")

    found = progress(story.events)

    assert before.per_minute is not None and len(before.running) == 1
    assert found.per_minute is None and found.running == () and found.ended == 8
    assert found.worked_s == pytest.approx(150)


def test_a_takeover_keeps_what_was_paid() -> None:
    story = JournalStory().begin("a", {}, config="c", seed=1, t=0.0)
    story.begin("a", {}, config="c", seed=1, t=100.0, attempt=2, parent="b").end("a", "done", 1.0, seconds=50, t=150)

    assert progress(story.events).card_hours(0) == pytest.approx(150 / 3600)
