"""What a sweep's history is found to say: baselines, rungs, lineage, fresh seeds, importance, cost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_story import STEPS, JournalStory

from tigerbot_jobs.sweep.analysis import History
from tigerbot_jobs.sweep.analysis_axes import axes
from tigerbot_jobs.sweep.analysis_cost import cost_to_close, failures, money, spent
from tigerbot_jobs.sweep.analysis_front import fronts
from tigerbot_jobs.sweep.analysis_importance import importances
from tigerbot_jobs.sweep.analysis_read import read_history
from tigerbot_jobs.sweep.analysis_search import best_so_far, i_epoch, random_band, rung_summaries, winning_line
from tigerbot_jobs.sweep.analysis_seeds import configurations, expected_luck, noise, recommended, reruns


@pytest.fixture
def told(tmp_path: Path):
    """A function from a story to its history."""
    return lambda story: read_history(story.write(tmp_path / "trials.jsonl"))


def test_the_best_so_far_only_gets_better_and_everything_is_paid_for(told) -> None:
    found = best_so_far(told(JournalStory(trials=60, scheduler="asha").asha(60)))

    assert all(later < earlier for earlier, later in pairwise(found.values)) and list(found.costs) == sorted(
        found.costs
    )
    assert found.costs[-1] <= found.total


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_band_of_random_search_is_seeded_and_holds_the_random_search_it_is_drawn_from(told, mode: str) -> None:
    history = told(JournalStory(trials=80, mode=mode).random_search(80))

    band, again, other = random_band(history), random_band(history), random_band(history, seed=2)

    assert band is not None and again is not None and other is not None
    assert np.array_equal(band.median, again.median) and not np.array_equal(band.low, other.low)
    assert np.all(band.low <= band.median) and np.all(band.median <= band.high) and band.pool == 80
    ours = best_so_far(history).values[-1]
    assert band.low[-1] <= ours <= band.high[-1]
    assert band.costs[-1] == pytest.approx(best_so_far(history).total, rel=0.02)


def test_a_searcher_that_learns_is_held_against_its_random_first_trials_and_no_further(told) -> None:
    history = told(JournalStory(trials=60, searcher="tpe").random_search(60))

    band = random_band(history)

    assert band is not None and band.startup and band.pool == 10
    assert band.costs[-1] == pytest.approx(best_so_far(history).total * 10 / 60, rel=0.02)


def test_a_population_has_no_random_band_and_its_best_is_what_it_had_on_the_way(told) -> None:
    history = told(JournalStory(scheduler="pbt").pbt())

    found = best_so_far(history)

    assert random_band(history) is None and i_epoch(history) == []
    assert len(found.values) > 3 and found.costs[0] < found.total / 2


def test_i_epoch_to_the_end_is_the_whole_search(told) -> None:
    history = told(JournalStory(trials=30).random_search(30))

    found = i_epoch(history)

    cost, value, until = found[-1]
    assert until == STEPS and value == history.best(1)[0].metric
    assert cost == pytest.approx(best_so_far(history).total)
    assert [cost for cost, _, _ in found] == sorted(cost for cost, _, _ in found)


def test_rungs_say_who_went_on_and_how_well_they_foretold_the_end(told) -> None:
    history = told(JournalStory(trials=90, scheduler="asha", sigma=0.01).asha(90))

    first, second, third = rung_summaries(history)

    assert (first.step, second.step, third.step) == (2, 6, 18) and len(first.values) == 90
    assert len(second.values) == first.promoted and len(third.values) == second.promoted
    assert third.correlation is not None and third.correlation > 0.9


def test_a_rung_that_was_promoted_later_keeps_its_value(told) -> None:
    story = JournalStory().begin("a", {}, config="c", seed=1, t=0.0)
    story.rung("a", 0, 2, 1.5, False).rung("a", 0, 2, 9.0, True).rung("a", 0, 2, 9.0, False)

    (found,) = rung_summaries(told(story))

    assert found.promoted == 1 and found.values[0].value == 1.5


def test_the_winning_line_is_whole_from_the_first_step_to_the_last(told) -> None:
    history = told(JournalStory(scheduler="pbt").pbt(members=8, generations=8))
    winner = history.best(1)[0].name

    line = winning_line(history, winner)

    assert line[0].start == 0 and line[0].exploit is None and line[-1].name == winner and line[-1].end == 40
    for before, after in pairwise(line):
        assert before.end == after.start and after.exploit is not None
        assert (after.exploit.name, after.exploit.source) == (after.name, before.name)


def test_the_winner_of_noise_is_cursed_and_fresh_seeds_say_so(told) -> None:
    story = JournalStory(trials=100, sigma=1.0)
    story.params = lambda: {"lr": 10**-2.5, "width": 256, "dropout": 0.1, "act": "relu"}  # all equally good
    history = told(story.random_search(100).fresh_seeds(best=5, seeds=8))

    found = reruns(history)

    assert len(found) == 5 and all(one.curse > 0.5 for one in found)  # expected: 1.7 to 2.5 sigma
    assert all(one.low < one.mean < one.high for one in found)
    assert sum(one.chance or 0 for one in found) == pytest.approx(1)
    assert noise(history) == pytest.approx(1.0, abs=0.25)
    best = recommended(history)
    assert best is not None and best.value == min(one.mean for one in found)


def test_the_interval_is_students(told) -> None:
    story = JournalStory().begin("a", {}, config="c", seed=1, t=0.0).end("a", "done", 0.5, seconds=1, t=1)
    for seed, metric in ((2, 1.0), (3, 2.0), (4, 3.0)):
        story.begin(f"a{seed}", {}, config="c", seed=seed, t=2.0, fresh=True).end(
            f"a{seed}", "done", metric, seconds=1, t=3
        )

    (found,) = reruns(told(story))

    assert (found.searched, found.mean, found.curse) == (0.5, 2.0, 1.5)
    assert found.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3) and found.chance is None


def test_with_several_seeds_in_the_search_a_configuration_is_worth_their_mean(told) -> None:
    story = JournalStory()
    for config, metrics in (("lucky", (0.1, 0.9)), ("steady", (0.4, 0.4)), ("cut", (0.2, None))):
        for seed, metric in enumerate(metrics):
            name, status = f"{config}{seed}", "stopped" if config == "cut" else "done"
            story.begin(name, {}, config=config, seed=seed, t=0.0)
            if metric is not None:
                story.end(name, status, metric, seconds=1, t=1)

    found = configurations(told(story))

    assert [(one.trial.config, one.value, one.whole) for one in found] == [
        ("steady", 0.4, True),
        ("lucky", 0.5, True),
        ("cut", 0.2, False),
    ]


def test_without_fresh_seeds_the_best_of_the_search_is_all_there_is(told) -> None:
    history = told(JournalStory().random_search(10))

    found = recommended(history)

    assert found is not None and found.rerun is None and found.trial is history.best(1)[0] and noise(history) is None


def test_the_luck_of_the_best_grows_with_the_number_of_trials() -> None:
    assert [round(expected_luck(n), 1) for n in (1, 10, 100, 1000)] == [0.0, 1.5, 2.5, 3.2]


def test_what_matters_comes_out_as_important_and_what_does_not_does_not(told) -> None:
    history = told(JournalStory(trials=150).random_search(150))

    found = importances(history, axes(history, {}))

    assert [one.name for one in found[:2]] == ["lr", "width"] and {one.name for one in found[2:]} == {"dropout", "act"}
    assert found[0].fanova > 0.6 and found[-1].fanova < 0.05
    assert all(one.ped_low <= one.ped_high for one in found)
    assert sum(one.fanova for one in found) == pytest.approx(1)


def test_few_trials_have_no_importance(told) -> None:
    history = told(JournalStory().random_search(20))

    assert importances(history, axes(history, {})) == []


def test_trials_that_are_all_alike_have_no_importance(told) -> None:
    story = JournalStory(trials=60)
    for index in range(60):
        story.begin(f"t{index}", story.params(), config=f"c{index}", seed=1, t=0.0)
        story.end(f"t{index}", "done", 1.0, seconds=1, t=1)
    history = told(story)

    assert importances(history, axes(history, {})) == []


def test_axes_take_their_bounds_from_the_space_and_their_scale_from_the_data(told) -> None:
    history = told(JournalStory(trials=60).random_search(60))
    space = {"lr": {"log_uniform": [1e-5, "1e-1"]}, "dropout": {"uniform": [0, 1], "when": {"act": "relu"}}}

    lr, width, dropout, act = axes(history, space)

    assert (lr.low, lr.high, lr.log, lr.bounded) == (1e-5, 1e-1, True, True)
    assert width.choices == ("64", "128", "256") and act.choices == ('"relu"', '"silu"')
    assert (dropout.high, dropout.log) == (1, False) and axes(history, {})[0].log
    assert lr.place({"lr": 1e-3}) == pytest.approx(0.5) and width.place({"width": 128}) == 0.5
    assert lr.place({}) is None and lr.place({"lr": "x"}) is None and width.place({"width": 7}) is None
    assert lr.edge({"lr": 9e-2}) == "high" and lr.edge({"lr": 1e-3}) == ""


def test_every_hour_is_somewhere_also_that_of_attempts_that_were_cut_short(told) -> None:
    story = JournalStory(trials=4, price=3.0).random_search(2)
    story.begin("cut", {}, config="x", seed=1, t=0.0).point("cut", 1, 1.0, 60).open("feedbeef")
    story.begin("cut", {}, config="x", seed=1, t=100.0, attempt=2).end("cut", "done", 0.1, seconds=40, t=140)
    story.begin("lives", {}, config="y", seed=1, t=100.0).point("lives", 1, 1.0, 130)
    history = told(story)

    found = {row.what: row for row in spent(history)}

    assert {what: row.trials for what, row in found.items()} == {"done": 3, "cut short": 1, "running": 1}
    assert found["done"].card_hours == pytest.approx((2 * 3 * STEPS + 40) / 3600)
    assert found["cut short"].hours == pytest.approx(60 / 3600) and found["running"].hours == pytest.approx(30 / 3600)
    assert money(history, 2.0) == 6.0 and len(history.lives) == 2


def test_failures_are_counted_by_cause_with_those_that_went_well_later(told) -> None:
    story = JournalStory()
    story.trial(0, status="failed", cause="bug", error="ValueError: no").trial(1, status="failed", cause="bug")
    for attempt, after in ((1, {}), (2, {"after": "node"}), (3, {"after": "node"})):
        story.begin("n", {}, config="n", seed=1, t=100.0 * attempt, attempt=attempt, **after).point(
            "n", attempt, 1.0, 100.0 * attempt + 36
        )
    story.end("n", "done", 0.5, seconds=10, t=400)

    bug, node = failures(told(story))

    assert (bug.cause, bug.attempts, bug.trials, bug.recovered, bug.error) == ("bug", 2, 2, 0, "ValueError: no")
    assert (node.cause, node.attempts, node.trials, node.recovered) == ("node", 2, 1, 1)
    assert node.card_hours == pytest.approx(72 / 3600)


def test_a_trial_that_ended_with_the_budget_did_not_fail(told) -> None:
    history = told(JournalStory().trial(0, status="killed", cause="budget").trial(1, status="killed", cause="deadline"))

    assert [failure.cause for failure in failures(history)] == ["deadline"]


def test_how_much_would_have_been_enough(told) -> None:
    story = JournalStory()
    for index, metric in enumerate([2.0, 1.001, 1.0, 1.5]):
        story.begin(f"t{index}", {}, config=f"c{index}", seed=1, t=0.0)
        story.end(f"t{index}", "done", metric, seconds=3600, t=index + 1.0)

    assert cost_to_close(told(story)) == (2.0, 4.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14))
def test_the_front_is_whoever_nobody_beats(tmp_path_factory, values: list[tuple[int, int]]) -> None:
    story = JournalStory()
    for index, (loss, speed) in enumerate(values):
        story.begin(f"t{index}", {}, config=f"c{index}", seed=1, t=0.0).point(f"t{index}", 1, loss, 1, speed=speed)
        story.end(f"t{index}", "done", loss, seconds=1, t=1)
    history = read_history(story.write(tmp_path_factory.mktemp("front") / "trials.jsonl"))

    found = fronts(history, {"tokens_per_s": "max"})

    for one in found:
        loss, speed = one.values
        beaten = any(a <= loss and b >= speed and (a, b) != (loss, speed) for a, b in values)
        assert one.front == (not beaten)


def test_a_history_without_trials_says_nothing_and_breaks_nothing(told) -> None:
    history: History = told(JournalStory())

    assert best_so_far(history).values == () and random_band(history) is None and i_epoch(history) == []
    assert rung_summaries(history) == reruns(history) == spent(history) == failures(history) == []
    assert recommended(history) is None and cost_to_close(history) is None and axes(history, {}) == []
