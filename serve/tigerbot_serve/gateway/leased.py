"""A replica's part of limits that several replicas share: leases from the bank, used without asking.

A lease is used until its end and what is left of it goes back to the second it was taken from. What a replica promised
but has not yet reported is never more than what it was lent. This module knows nothing about Ray or the event loop;
`leased_limiter.py` sends the asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tigerbot.spec.access import LimitsSpec
from tigerbot_serve.gateway.bank import LEASE_S, Ask, Grant
from tigerbot_serve.gateway.limits import (
    Reservation,
    Standing,
    no_budget,
    no_requests,
    no_tokens,
    too_many_at_once,
)

MAX_SPARE = 64  # places beyond those in use
ASK_AGAIN_S = 1.0  # after something was not to be had


@dataclass(slots=True)
class Lease:
    """Requests or tokens, good until a moment of the local clock; taken from a slot of the bank's."""

    slot: int
    until: float
    left: int


@dataclass
class LeasedReservation(Reservation):
    """`pieces`: the leases its tokens came from, and how many of each."""

    pieces: list[tuple[Lease, int]] = field(default_factory=list)


class Pile:
    """Leases of one kind, the oldest used first."""

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._returned: dict[int, int] = {}
        self._left = 0  # of all leases
        self.used = 0  # since the last ask

    def left(self, now: float) -> int:
        self._drop_ended(now)
        return self._left

    def add(self, lease: Lease) -> None:
        if lease.left:
            self._leases.append(lease)
            self._left += lease.left

    def take(self, amount: int, now: float) -> list[tuple[Lease, int]]:
        """Pieces of leases that are this much together; they are there."""
        self._drop_ended(now)
        self.used += amount
        self._left -= amount
        pieces = []
        for lease in self._leases:
            part = min(amount, lease.left)
            if part:
                lease.left -= part
                amount -= part
                pieces.append((lease, part))
        return pieces

    def give_back(self, pieces: list[tuple[Lease, int]], amount: int, now: float) -> None:
        """Undo a part of what was taken, into leases that still hold or to the bank."""
        self.used = max(0, self.used - amount)
        for lease, part in pieces:
            back = min(part, amount)
            amount -= back
            if lease.until > now:
                lease.left += back
                self._left += back
            elif back:
                self._returned[lease.slot] = self._returned.get(lease.slot, 0) + back

    def returned(self, now: float) -> tuple[tuple[int, int], ...]:
        """What goes back to the bank, once."""
        self._drop_ended(now)
        found, self._returned = tuple(self._returned.items()), {}
        return found

    def _drop_ended(self, now: float) -> None:
        if self._leases and self._leases[0].until <= now:
            for lease in self._leases:
                if lease.until <= now and lease.left:
                    self._returned[lease.slot] = self._returned.get(lease.slot, 0) + lease.left
                    self._left -= lease.left
                    lease.left = 0
            self._leases = [lease for lease in self._leases if lease.until > now]


class LeasedAccount:
    """A key, as one replica of several sees it.

    Args:
        clock: monotonic seconds.
        wall: seconds since the epoch.
    """

    def __init__(self, limits: LimitsSpec, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.limits = limits
        self._clock, self._wall = clock, wall
        self._requests, self._tokens = Pile(), Pile()
        self._running = self._places = 0
        self._lent = self._promised = self._spent = 0
        self._charged_requests = self._charged_tokens = 0
        self._need_requests = self._need_tokens = self._need_cost = 0
        self._rate_requests = self._rate_tokens = self._rate_cost = 0.0
        self._reserved_cost = 0  # since the last ask
        self._asked = clock()
        self._refused_until = 0.0
        self._grant: Grant | None = None

    def change(self, limits: LimitsSpec) -> None:
        self.limits = limits

    @property
    def _free_cost(self) -> int:
        return self._lent - self._promised - self._spent

    @property
    def idle(self) -> bool:
        """Nothing is held, wanted or to be reported: the bank need not hear of it."""
        now = self._clock()
        held = self._requests.left(now) or self._tokens.left(now) or self._places or self._lent
        return not (held or self._running or self._spent or self._need_requests or self._charged_tokens)

    def covers(self, tokens: int, spends: int) -> bool:
        """Whether a request can be taken without asking."""
        now = self._clock()
        return (
            self._running < self._places
            and self._requests.left(now) >= 1
            and self._tokens.left(now) >= tokens
            and (self.limits.budget is None or self._free_cost >= spends)
        )

    @property
    def low(self) -> bool:
        """Half of a second's worth is gone: time to ask, before somebody has to wait."""
        now = self._clock()
        return (
            self._requests.left(now) < self._rate_requests / 2
            or self._tokens.left(now) < self._rate_tokens / 2
            or self._running >= self._places
        )

    @property
    def refused(self) -> bool:
        """The bank said no a moment ago."""
        return self._clock() < self._refused_until

    def want(self, tokens: int, spends: int) -> None:
        """Somebody waits for this."""
        self._need_requests += 1
        self._need_tokens += tokens
        self._need_cost += spends

    def ask(self) -> Ask:
        """What to tell the bank now. What is told is told once: `failed` if it did not arrive."""
        now = self._clock()
        passed = max(0.05, now - self._asked)
        self._rate_requests = max(self._requests.used / passed, self._rate_requests / 2)
        self._rate_tokens = max(self._tokens.used / passed, self._rate_tokens / 2)
        self._rate_cost = max(self._reserved_cost / passed, self._rate_cost / 2)
        self._asked, self._requests.used, self._tokens.used, self._reserved_cost = now, 0, 0, 0
        requests = self._need_requests + int(self._rate_requests) - self._requests.left(now)
        tokens = self._need_tokens + int(self._rate_tokens) - self._tokens.left(now)
        spare = min(int(self._rate_requests) + 1, MAX_SPARE) if self._rate_requests >= 0.5 else 0
        places = self._running + self._need_requests + spare
        cost = self._promised + self._need_cost + int(self._rate_cost)
        ask = Ask(
            limits=self.limits,
            requests=max(0, requests),
            tokens=max(0, tokens),
            places=min(places, self.limits.concurrent),
            cost=cost if self.limits.budget is not None else 0,
            spent=self._spent,
            charged_requests=self._charged_requests,
            charged_tokens=self._charged_tokens,
            returned_requests=self._requests.returned(now),
            returned_tokens=self._tokens.returned(now),
        )
        self._need_requests = self._need_tokens = self._need_cost = 0
        # Until the answer is here, no more is used than the bank will know of whatever it grants.
        self._lent = min(self._lent - self._spent, ask.cost)
        self._places = min(self._places, ask.places)
        self._spent = self._charged_requests = self._charged_tokens = 0
        return ask

    def granted(self, ask: Ask, grant: Grant) -> None:
        """The bank's answer to the last ask."""
        until = self._asked + LEASE_S  # by the moment of asking: the bank took it later
        self._requests.add(Lease(grant.slot, until, grant.requests))
        self._tokens.add(Lease(grant.slot, until, grant.tokens))
        self._places, self._lent, self._grant = grant.places, grant.cost, grant
        if grant.requests < ask.requests or grant.tokens < ask.tokens or grant.budget_short:
            self._refused_until = self._clock() + ASK_AGAIN_S

    def failed(self, ask: Ask) -> None:
        """The ask may not have arrived: what it told of spending is told again, what it gave back is lost."""
        self._spent += ask.spent
        self._lent += ask.spent
        self._charged_requests += ask.charged_requests
        self._charged_tokens += ask.charged_tokens

    def used_unleased(self, tokens: int, spent: int) -> None:
        """A request that no lease covered, to be reported."""
        self._charged_requests += 1
        self._charged_tokens += tokens
        self._spent += spent
        self._lent += spent

    def reserve(self, tokens: int, spends: int) -> LeasedReservation:
        now, limits, grant = self._clock(), self.limits, self._grant
        if self._running >= self._places:
            raise too_many_at_once(limits)
        if self._requests.left(now) < 1:
            raise no_requests(limits, grant.requests_wait_s if grant and grant.requests_wait_s else 1.0)
        if self._tokens.left(now) < tokens:
            raise no_tokens(limits, tokens, grant.tokens_wait_s if grant and grant.tokens_wait_s else 1.0)
        if limits.budget is not None and self._free_cost < spends:
            raise no_budget(limits.budget, self._wall())
        self._running += 1
        self._promised += spends
        self._reserved_cost += spends
        self._requests.take(1, now)
        return LeasedReservation(self, tokens, spends, pieces=self._tokens.take(tokens, now))

    def settle(self, held: Reservation, tokens: int, spent: int) -> None:
        assert isinstance(held, LeasedReservation)
        if held.settled:
            return
        held.settled = True
        self._running -= 1
        self._promised -= held.cost
        self._spent += spent
        if tokens <= held.tokens:
            self._tokens.give_back(held.pieces, held.tokens - tokens, self._clock())
        else:
            self._charged_tokens += tokens - held.tokens

    def standing(self) -> Standing:
        now, grant = self._clock(), self._grant
        requests, tokens = self._requests.left(now), self._tokens.left(now)
        if grant is None:
            return Standing(self.limits.requests_per_minute, self.limits.tokens_per_minute, 0.0, 0.0)
        passed = now - self._asked
        return Standing(
            requests + grant.requests_left,
            tokens + grant.tokens_left,
            max(0.0, grant.requests_reset_s - passed),
            max(0.0, grant.tokens_reset_s - passed),
        )
