"""Rate windows, leases of them, and budgets: whatever is asked in whatever order, no minute holds more than the limit."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tigerbot.spec.access import BudgetSpec, LimitsSpec, PriceSpec
from tigerbot_serve.gateway.bank import SILENT_S, Bank
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.leased import LeasedAccount
from tigerbot_serve.gateway.ledger import Ledger, Tokens, cost, period_left_s, period_of
from tigerbot_serve.gateway.limits import LocalAccount
from tigerbot_serve.gateway.windows import Window, duration


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def most_in_a_minute(taken: list[tuple[float, int]]) -> int:
    """The largest sum over any 60 seconds; it suffices to begin one at every event."""
    return max((sum(n for at, n in taken if start <= at < start + 60) for start, _ in taken), default=0)


STEPS = st.lists(st.tuples(st.floats(0, 40), st.integers(0, 12), st.floats(0, 1)), max_size=60)


@settings(max_examples=80, deadline=None)
@given(STEPS, st.integers(1, 30))
def test_no_minute_holds_more_than_the_limit_and_refunds_are_exact(steps, limit: int):
    clock, window, taken = Clock(), Window(limit), []

    for passed, amount, kept in steps:
        clock.now += passed
        left = window.left(clock.now)
        slot = window.take(amount, clock.now)
        assert (slot is not None) == (amount <= left)
        if slot is not None:
            back = amount - int(kept * amount)
            window.give_back(back, slot, clock.now)
            assert window.left(clock.now) == left - (amount - back)
            taken.append((clock.now, amount - back))

    assert most_in_a_minute(taken) <= limit
    assert window.left(clock.now + 61) == limit


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 30), st.integers(1, 30))
def test_after_the_wait_that_a_refusal_names_there_is_room_and_not_before(steps, limit: int, wanted: int):
    clock, window = Clock(), Window(limit)
    for passed, amount, _ in steps:
        clock.now += passed
        window.take(amount, clock.now)

    wait_s = window.wait_s(wanted, clock.now)

    if wanted > limit:
        assert wait_s == float("inf")
        return
    reset_s = window.reset_s(clock.now)
    assert wait_s == 0 or window.left(clock.now) < wanted
    assert window.left(clock.now + wait_s + 1e-6) >= wanted
    assert wait_s <= reset_s and window.left(clock.now + reset_s + 1e-6) == limit


def test_a_clock_that_jumps_back_gives_nothing_away():
    window = Window(5)
    window.take(5, 1000.0)

    assert window.take(1, 900.0) is None
    assert window.take(1, 1061.0) is not None


class Fleet:
    """N replicas over one bank. `deaf` replicas do not reach it."""

    def __init__(self, replicas: int, limits: LimitsSpec, ledger: Ledger | None = None) -> None:
        self.clock, self.wall = Clock(), Clock(1_790_000_000.0)
        self.ledger = ledger or Ledger()
        self.bank = Bank(self.ledger, clock=self.clock, wall=self.wall)
        self.accounts = [LeasedAccount(limits, self.clock, self.wall) for _ in range(replicas)]
        self._spoke = [0.0] * replicas

    def passes(self, seconds: float) -> None:
        """Time, in which no replica that lives is silent for so long that the bank gives it up."""
        self.clock.now += seconds
        for place, spoke in enumerate(self._spoke):
            if self.clock.now - spoke > SILENT_S / 2:
                self.sync(place)

    def sync(self, place: int) -> None:
        self._spoke[place] = self.clock.now
        ask = self.accounts[place].ask()
        self.accounts[place].granted(ask, self.bank.sync(str(place), {"k": ask})["k"])

    def take(self, place: int, tokens: int, spends: int = 0):
        """As a request does: ask if it is not covered, then reserve or be refused."""
        account = self.accounts[place]
        if not account.covers(tokens, spends) and not account.refused:
            account.want(tokens, spends)
            self.sync(place)
        try:
            return account.reserve(tokens, spends)
        except ApiError as error:
            assert error.status == 429
            return None


@settings(max_examples=60, deadline=None)
@example(seed=1095, replicas=2, tokens=38, concurrent=3)
@given(seed=st.integers(0, 2**32), replicas=st.integers(1, 4), tokens=st.integers(5, 60), concurrent=st.integers(1, 6))
def test_leases_of_many_replicas_never_exceed_the_limits(seed: int, replicas: int, tokens: int, concurrent: int):
    draw = random.Random(seed)
    limits = LimitsSpec(requests_per_minute=12, tokens_per_minute=tokens, concurrent=concurrent)
    fleet = Fleet(replicas, limits)
    running, requests, used = [], [], []

    for _ in range(120):
        fleet.passes(draw.choice((0, 0.01, 0.3, 1, 5)))
        place = draw.randrange(replicas)
        if draw.random() < 0.3:
            fleet.sync(place)
        if running and draw.random() < 0.5:
            place, held, at = running.pop(draw.randrange(len(running)))
            spent = draw.randint(0, held.tokens)
            fleet.accounts[place].settle(held, spent, 0)
            fleet.accounts[place].settle(held, spent, 0)
            used.append((at, spent))
        elif (held := fleet.take(place, draw.randint(1, 8))) is not None:
            requests.append((fleet.clock.now, 1))
            running.append((place, held, fleet.clock.now))
        assert len(running) <= concurrent

    assert most_in_a_minute(requests) <= 12
    assert most_in_a_minute(used + [(at, held.tokens) for _, held, at in running]) <= tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_budget_lent_in_pieces_is_never_overspent(seed: int, replicas: int):
    draw = random.Random(seed)
    fleet = Fleet(replicas, LimitsSpec(budget=BudgetSpec(tokens=100)))
    running, spent = [], 0

    for _ in range(150):
        fleet.passes(draw.choice((0, 0.3, 1)))
        place = draw.randrange(replicas)
        if draw.random() < 0.4:
            fleet.sync(place)
        if running and draw.random() < 0.5:
            place, held = running.pop()
            used = draw.randint(0, held.cost)
            fleet.accounts[place].settle(held, used, used)
            spent += used
        elif (held := fleet.take(place, 1, draw.randint(1, 20))) is not None:
            running.append((place, held))
        assert spent + sum(held.cost for _, held in running) <= 100

    while running:
        place, held = running.pop()
        fleet.accounts[place].settle(held, held.cost, held.cost)
        spent += held.cost
    for _ in range(2):
        for place in range(replicas):
            fleet.sync(place)
    assert fleet.ledger.spent("k", BudgetSpec(tokens=100), fleet.wall()) == spent


def test_what_a_replica_held_when_it_died_comes_back_and_its_budget_counts_as_spent():
    budget = BudgetSpec(tokens=100)
    fleet = Fleet(2, LimitsSpec(concurrent=1, budget=budget))
    assert fleet.take(0, 5, 30) is not None
    assert fleet.take(1, 5, 30) is None, "the only place is taken"

    fleet.clock.now += SILENT_S + 1

    assert fleet.take(1, 5, 30) is not None
    assert fleet.ledger.spent("k", budget, fleet.wall()) == 30


def test_a_quiet_key_costs_the_bank_nothing():
    fleet = Fleet(1, LimitsSpec())
    held = fleet.take(0, 5)
    assert held is not None
    fleet.accounts[0].settle(held, 5, 0)

    for _ in range(8):
        fleet.clock.now += 1
        if not fleet.accounts[0].idle:
            fleet.sync(0)

    assert fleet.accounts[0].idle


def test_the_ledger_outlives_its_process_and_a_broken_one_is_set_aside(tmp_path: Path):
    path, budget, now = tmp_path / "budgets.json", BudgetSpec(money=2.5, per="day"), 1_790_000_000.0
    ledger = Ledger(path)
    ledger.add("k", budget, 700_000, now)
    ledger.add("k", budget, 100_000, now)
    ledger.close()

    assert Ledger(path).spent("k", budget, now) == 800_000
    assert Ledger(path).spent("k", budget, now + 86_400) == 0, "another day"
    path.write_text("{")
    assert Ledger(path).spent("k", budget, now) == 0
    assert (tmp_path / "budgets.broken").exists()


def test_a_budget_that_is_reserved_is_not_promised_twice():
    clock, wall, ledger = Clock(), Clock(1_790_000_000.0), Ledger()
    account = LocalAccount("k", LimitsSpec(budget=BudgetSpec(tokens=100)), ledger, clock, wall)
    first = account.reserve(60, 60)

    with pytest.raises(ApiError) as refused:
        account.reserve(60, 60)

    assert refused.value.code == "insufficient_quota"
    assert refused.value.headers["x-should-retry"] == "false" and int(refused.value.headers["retry-after"]) > 0
    account.settle(first, 10, 10)
    assert account.reserve(60, 60) is not None


def test_drafts_and_what_the_judge_reads_have_their_price():
    tokens = Tokens(prompt=100, completion=50, draft=50, judge=200)

    assert cost(tokens, BudgetSpec(tokens=1), PriceSpec()) == 400
    assert cost(tokens, BudgetSpec(money=1), PriceSpec(prompt=0.01, completion=0.03)) == 6_000
    assert cost(Tokens(prompt=1), BudgetSpec(money=1), PriceSpec(prompt=1e-9)) == 1, "rounded up"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.12, "120ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"), (3725, "1h2m5s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str):
    assert duration(seconds) == text


def test_periods_end_with_the_calendar_in_utc():
    new_year = datetime(2026, 12, 31, 23, 59, tzinfo=UTC).timestamp()

    assert (period_of(new_year, "day"), period_of(new_year, "month")) == ("2026-12-31", "2026-12")
    assert period_left_s(new_year, "day") == period_left_s(new_year, "month") == 60
