"""Who trains with whom: generations, spares, and whoever speaks for an older one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tigerbot_jobs.train.recovery.rendezvous import Phase, Rendezvous


def begun(low: int, high: int, *workers: str) -> Rendezvous:
    rendezvous = Rendezvous(low, high)
    for worker in workers:
        rendezvous.ready(worker)
    assert rendezvous.next_generation() is not None
    return rendezvous


def test_a_standby_takes_the_place_of_the_dead_and_survivors_keep_theirs() -> None:
    rendezvous = begun(2, 3, "a", "b", "c", "spare")

    assert rendezvous.lost("b")
    for survivor in ("a", "c"):
        rendezvous.out(survivor)
    generation = rendezvous.next_generation()

    assert generation is not None and generation.number == 2
    assert generation.members == ("a", "spare", "c")


def test_without_a_standby_training_goes_on_with_fewer_and_grows_when_there_is_one() -> None:
    rendezvous = begun(1, 2, "a", "b")

    rendezvous.lost("a")
    rendezvous.out("b")
    smaller = rendezvous.next_generation()
    rendezvous.ready("new")

    assert smaller is not None and smaller.members == ("b",)
    assert rendezvous.wants_to_grow
    rendezvous.end()
    rendezvous.out("b")
    larger = rendezvous.next_generation()
    assert larger is not None and larger.members == ("b", "new")


def test_the_next_generation_waits_until_every_living_member_is_out() -> None:
    rendezvous = begun(1, 3, "a", "b", "c")

    rendezvous.lost("c")
    rendezvous.out("a")

    assert rendezvous.awaited == ("b",) and rendezvous.next_generation() is None
    rendezvous.lost("b")
    generation = rendezvous.next_generation()
    assert generation is not None and generation.members == ("a",)


def test_below_the_least_size_nobody_trains() -> None:
    rendezvous = begun(2, 2, "a", "b")

    rendezvous.lost("a")
    rendezvous.out("b")

    assert rendezvous.next_generation() is None and rendezvous.phase is Phase.ENDING
    rendezvous.ready("new")
    generation = rendezvous.next_generation()
    assert generation is not None and generation.members == ("new", "b")


def test_at_the_start_it_waits_for_its_full_size_if_asked_to() -> None:
    rendezvous = Rendezvous(1, 3)
    rendezvous.ready("a")

    assert rendezvous.next_generation(wait_for=2) is None
    rendezvous.ready("b")
    generation = rendezvous.next_generation(wait_for=2)
    assert generation is not None and generation.world_size == 2


def test_nobody_speaks_for_an_older_generation() -> None:
    rendezvous = begun(1, 2, "a", "b")
    rendezvous.lost("a")
    rendezvous.out("b")
    rendezvous.next_generation()

    assert not rendezvous.is_member("b", 1) and rendezvous.is_member("b", 2)
    assert not rendezvous.is_member("a", 2)


def test_a_barred_worker_gets_no_rank() -> None:
    rendezvous = begun(1, 2, "a", "b", "spare")

    rendezvous.bar("a")
    rendezvous.end()
    for member in ("a", "b"):
        rendezvous.out(member)
    generation = rendezvous.next_generation()

    assert generation is not None and generation.members == ("spare", "b")
    assert rendezvous.spares == ()


@given(
    st.integers(1, 3), st.integers(0, 3), st.lists(st.sampled_from(["join", "die", "out", "form", "end"]), max_size=60)
)
def test_whatever_happens_a_rank_is_held_once_by_the_living(low: int, more: int, events: list[str]) -> None:
    rendezvous, alive, names, last = Rendezvous(low, low + more), [], iter(range(1000)), 0

    for event in events:
        if event == "join":
            alive.append(f"w{next(names)}")
            rendezvous.ready(alive[-1])
        elif event == "die" and alive:
            rendezvous.lost(alive.pop(0))
        elif event == "out":
            for member in rendezvous.awaited:
                rendezvous.out(member)
        elif event == "end":
            rendezvous.end()
        elif (generation := rendezvous.next_generation()) is not None:
            assert generation.number > last
            last = generation.number
            assert low <= generation.world_size <= low + more
            assert len(set(generation.members)) == generation.world_size
            assert set(generation.members) <= set(alive)
            assert not set(generation.members) & set(rendezvous.spares)
