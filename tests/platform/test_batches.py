"""What is told to MLflow in one call: all of it, in order, once, within MLflow's limits."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.batches import Chunk, Point, chunks, fitted, gathered, new_points

NAMES = st.sampled_from(["loss", "lr", "accuracy"])
POINTS = st.lists(st.builds(Point, NAMES, st.floats(allow_nan=False), st.integers(0, 9), st.integers(-3, 20)))


@settings(max_examples=60, deadline=None)
@given(
    params=st.dictionaries(st.text("ab准", min_size=1, max_size=6), st.sampled_from(["1", "准" * 5900]), max_size=250),
    points=st.integers(0, 2500),
    tags=st.dictionaries(st.text("ab", min_size=1, max_size=6), st.just("x" * 7000), max_size=150),
)
def test_calls_hold_everything_in_order_and_stay_within_limits(params, points, tags) -> None:
    said = [Point("loss", n / 3, n, n) for n in range(points)]

    found = list(chunks(params, said, tags))

    assert [entity for chunk in found for entity in chunk.params] == list(params.items())
    assert [point for chunk in found for point in chunk.points] == said
    assert [entity for chunk in found for entity in chunk.tags] == list(tags.items())
    for chunk in found:
        assert 0 < len(chunk) <= 1000 and len(chunk.params) <= 100 and len(chunk.tags) <= 100
        assert len(json.dumps([chunk.params, chunk.points, chunk.tags])) < 1_000_000


@given(st.lists(st.integers()), st.lists(st.integers()), st.lists(st.integers()))
def test_halves_of_a_call_are_the_call(params, points, tags) -> None:
    call = Chunk(params, points, tags)

    first, second = call.halves()

    assert (first.params + second.params, first.points + second.points) == (params, points)
    assert first.tags + second.tags == tags
    assert len(first) == len(call) // 2


@given(st.lists(POINTS, max_size=6))
def test_however_points_are_batched_and_repeated_each_step_of_a_metric_is_told_once(batches) -> None:
    told: list[Point] = []
    last: dict[str, int] = {}
    for batch in batches:
        for again in (batch, batch):
            new = new_points(again, last)
            told += new
            last |= {point.name: point.step for point in new}

    for name in last:
        steps = [point.step for point in told if point.name == name]
        assert steps == sorted(set(steps))
    everything = [point for batch in batches for point in batch]
    assert told == new_points(everything, {})


def test_a_run_that_goes_on_after_its_end_is_open() -> None:
    start = {"run": "a", "op": "start", "params": {"lr": "1"}}
    end = {"run": "a", "op": "finish", "status": "FAILED"}

    again, _ = gathered([start, end, start | {"params": {"lr": "2", "b": "3"}}])
    ended, _ = gathered([start, end, start, end])

    assert again["a"].end is None and again["a"].params == {"lr": "1", "b": "3"}
    assert ended["a"].end == end


def test_long_values_that_differ_stay_different() -> None:
    one, other = fitted("x" * 9000 + "1", 6000), fitted("x" * 9000 + "2", 6000)

    assert len(one) == len(other) == 6000
    assert one != other
    assert fitted("short", 6000) == "short"
