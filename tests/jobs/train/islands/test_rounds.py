"""What the server decides, with a clock that the test turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tigerbot.errors import CorruptError, SpecError
from tigerbot.spec import parse_spec, spec_hash
from tigerbot_jobs.train.islands.layout import Piece
from tigerbot_jobs.train.islands.rounds import FIRST_DEADLINE_S, GRACE_S, LEAST_DEADLINE_S, Rounds, Settings
from tigerbot_jobs.train.islands.state import FILE, load_state

SIZES, WHOLE = {"a": 300}, [Piece("a", 0, 300)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(folder: Path, clock: Clock, count: int = 2) -> Rounds:
    rounds = Rounds(Settings(count=count, lr=1.0, momentum=0.0), folder, clock)
    for island in range(count):
        rounds.connected(island, 1)
    rounds.seed("first", SIZES, WHOLE, np.zeros(300, np.float32))
    for island in range(count):
        rounds.report(island)
    return rounds


def bring(rounds: Rounds, island: int, value: float = 1.0, *, life: str = "x", step: int = 20) -> str:
    return rounds.deliver(island, (life, step), rounds.round, WHOLE, np.full(300, value, np.float32))


def test_the_deadline_is_learnt_from_how_long_rounds_take(tmp_path: Path) -> None:
    clock = Clock()
    rounds = opened(tmp_path, clock)
    unlearnt = rounds.deadline_s

    for seconds in (30, 40, 50):
        clock.now += seconds
        bring(rounds, 0)
        clock.now += 5
        bring(rounds, 1)
        assert rounds.closes_in() == 0
        rounds.close()

    assert unlearnt == FIRST_DEADLINE_S and rounds.deadline_s == 40
    assert Rounds(rounds.settings, tmp_path, clock).deadline_s == 40


def test_a_lost_island_is_waited_for_once_and_counts_again_when_it_reports(tmp_path: Path) -> None:
    clock = Clock()
    rounds = opened(tmp_path, clock)
    clock.now += 10
    bring(rounds, 0)
    first_wait = rounds.closes_in()
    clock.now += first_wait or 0
    missed = rounds.close().missed

    bring(rounds, 0)
    second_wait = rounds.closes_in()
    rounds.close()
    rounds.report(1)
    bring(rounds, 0)

    assert first_wait == 10 and missed == [1]
    assert second_wait == 0
    assert rounds.closes_in() == max(LEAST_DEADLINE_S, rounds.deadline_s)


def test_an_island_whose_connections_are_gone_is_waited_for_a_moment_only(tmp_path: Path) -> None:
    clock = Clock()
    rounds = opened(tmp_path, clock)
    clock.now += 60
    rounds.connected(1, -1)
    clock.now += 1

    bring(rounds, 0)

    assert rounds.closes_in() == GRACE_S - 1


def test_an_islands_new_life_replaces_what_its_old_one_brought(tmp_path: Path) -> None:
    rounds = opened(tmp_path, Clock())
    half = [Piece("a", 0, 100)]
    rounds.deliver(1, ("old", 20), 0, half, np.full(100, 50, np.float32))

    bring(rounds, 1, 2.0, life="new")
    bring(rounds, 0, 4.0)
    rounds.close()

    assert rounds.state is not None
    assert np.allclose(rounds.state.parameter("a"), -3, atol=1e-5)


def test_a_newcomer_hears_how_much_of_the_round_has_passed(tmp_path: Path) -> None:
    clock = Clock()
    rounds = opened(tmp_path, clock)
    clock.now += 10
    bring(rounds, 0), bring(rounds, 1)
    rounds.close()

    clock.now += 4

    assert rounds.answer(1, WHOLE, None)[0]["passed"] == pytest.approx(0.4)


def test_the_state_on_disk_is_whole_after_every_round_and_damage_is_said(tmp_path: Path) -> None:
    rounds = opened(tmp_path, Clock(), count=1)
    for value in (1.0, 2.0):
        bring(rounds, 0, value)
        rounds.close()

    kept = load_state(tmp_path)

    assert kept is not None and rounds.state is not None
    assert (
        kept.round == 2 and (kept.params == rounds.state.params).all() and (kept.carried == rounds.state.carried).all()
    )
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(CorruptError, match="is damaged"):
        load_state(tmp_path)


def spec(**islands: object) -> dict:
    return {
        "kind": "train",
        "name": "x",
        "model": {"preset": "tiny"},
        "data": {"train": [{"path": "t"}]},
        "train": {"tokens": 1000},
        "islands": islands,
    }


@pytest.mark.parametrize(
    ("islands", "message"),
    [
        ({"count": 0}, "islands.count"),
        ({"every": 0}, "islands.every"),
        ({"outer_momentum": 1.0}, "islands.outer_momentum"),
        ({"quantize": "int4"}, "islands.quantize"),
        ({"server": "somewhere"}, "islands.server"),
        ({"count": 2, "member": 2}, r"wants islands 0..1; got 2"),
        ({"evry": 3}, "did you mean every"),
    ],
)
def test_a_wrong_islands_section_is_refused_by_name(islands: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(spec(**islands))


def test_where_the_server_is_does_not_make_it_another_run_but_the_member_does() -> None:
    here, there = spec(member=0), spec(member=0, server="a.b:1", deadline_s=3)

    assert spec_hash(parse_spec(here)) == spec_hash(parse_spec(there))
    assert spec_hash(parse_spec(here)) != spec_hash(parse_spec(spec(member=1)))
