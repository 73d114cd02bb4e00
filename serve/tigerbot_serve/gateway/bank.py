"""One place that knows what all replicas of an endpoint let through, and lends it to them in pieces.

A replica asks for about a second's worth of a key's requests and tokens, uses them without asking again, and gives back
what it did not use. A lease is good for `LEASE_S`; the windows here are that much longer than a minute, so that no 60
seconds hold more than the limit however late a lease is used. Places for concurrent requests and the budget are lent too;
of a replica that is not heard of any more, places come back and the budget it held counts as spent: never too little. What is lent stands in the ledger's file before
a replica has it, so that the same holds of a bank that is killed.

This module knows nothing about Ray; `bank_actor.py` makes an actor of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tigerbot.spec.access import LimitsSpec
from tigerbot_serve.gateway.ledger import Ledger, allowance
from tigerbot_serve.gateway.windows import SPAN_S, Window

LEASE_S = 2
SILENT_S = 15.0  # a replica speaks every second while it holds anything


@dataclass(frozen=True)
class Ask:
    """What a replica says about one key.

    Attributes:
        requests, tokens: wanted on top of what it holds.
        places: wanted in all, for requests at a time.
        cost: budget wanted in all, beyond what is spent.
        spent: of the budget, since it last asked.
        charged_requests, charged_tokens: used beyond what was leased, since it last asked.
        returned_requests, returned_tokens: (slot, amount) of leases that were not used.
    """

    limits: LimitsSpec
    requests: int = 0
    tokens: int = 0
    places: int = 0
    cost: int = 0
    spent: int = 0
    charged_requests: int = 0
    charged_tokens: int = 0
    returned_requests: tuple[tuple[int, int], ...] = ()
    returned_tokens: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Grant:
    """What it gets: whatever there is, up to what it asked for.

    Attributes:
        slot: where requests and tokens were taken from, to give them back.
        places, cost: held in all.
        requests_left, tokens_left: still to be had, by anybody.
        requests_wait_s, tokens_wait_s: until what was missing can be had.
        budget_short: the budget does not cover what was wanted.
    """

    slot: int
    requests: int
    tokens: int
    places: int
    cost: int
    requests_left: int
    tokens_left: int
    requests_wait_s: float
    tokens_wait_s: float
    requests_reset_s: float
    tokens_reset_s: float
    budget_short: bool


@dataclass
class _Vault:
    requests: Window
    tokens: Window
    places: dict[str, int] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    limits: LimitsSpec = field(default_factory=LimitsSpec)


class Bank:
    """The limits of every key, over all replicas.

    Args:
        ledger: what was spent, kept on disk.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._ledger, self._clock, self._wall = ledger, clock, wall
        self._vaults: dict[str, _Vault] = {}
        self._unwritten = False
        self._heard: dict[str, float] = {}

    def sync(self, replica: str, asks: Mapping[str, Ask]) -> dict[str, Grant]:
        """Settle what a replica used and lend it what it asks for, key by key."""
        now = self._clock()
        self._heard[replica] = now
        self._forget_silent(now)
        grants = {key_id: self._serve(replica, key_id, ask, now) for key_id, ask in asks.items()}
        if self._unwritten:  # before a replica spends it
            self._ledger.write()
            self._unwritten = False
        return grants

    def close(self) -> None:
        """Write down what was spent."""
        self._ledger.close()

    def _serve(self, replica: str, key_id: str, ask: Ask, now: float) -> Grant:
        vault = self._vault(key_id, ask.limits)
        for slot, amount in ask.returned_requests:
            vault.requests.give_back(amount, slot, now)
        for slot, amount in ask.returned_tokens:
            vault.tokens.give_back(amount, slot, now)
        vault.requests.charge(ask.charged_requests, now)
        vault.tokens.charge(ask.charged_tokens, now)
        requests = max(0, min(ask.requests, vault.requests.left(now)))
        tokens = max(0, min(ask.tokens, vault.tokens.left(now)))
        requests_wait_s = (
            vault.requests.wait_s(min(ask.requests, vault.requests.limit), now) if requests < ask.requests else 0.0
        )
        tokens_wait_s = vault.tokens.wait_s(min(ask.tokens, vault.tokens.limit), now) if tokens < ask.tokens else 0.0
        slot = vault.requests.charge(requests, now)
        vault.tokens.charge(tokens, now)
        cost, short = self._lend_budget(vault, replica, key_id, ask)
        return Grant(
            slot=slot,
            requests=requests,
            tokens=tokens,
            places=self._lend_places(vault, replica, ask),
            cost=cost,
            requests_left=vault.requests.left(now),
            tokens_left=vault.tokens.left(now),
            requests_wait_s=requests_wait_s,
            tokens_wait_s=tokens_wait_s,
            requests_reset_s=vault.requests.reset_s(now),
            tokens_reset_s=vault.tokens.reset_s(now),
            budget_short=short,
        )

    def _lend_places(self, vault: _Vault, replica: str, ask: Ask) -> int:
        elsewhere = sum(count for name, count in vault.places.items() if name != replica)
        # Places in use cannot be taken away: after a limit was lowered a replica may hold more than it is lent anew.
        vault.places[replica] = max(0, min(ask.places, ask.limits.concurrent - elsewhere))
        return vault.places[replica]

    def _lend_budget(self, vault: _Vault, replica: str, key_id: str, ask: Ask) -> tuple[int, bool]:
        budget = ask.limits.budget
        if budget is None:
            vault.costs.pop(replica, None)
            return 0, False
        self._ledger.add(key_id, budget, ask.spent, self._wall())
        elsewhere = sum(cost for name, cost in vault.costs.items() if name != replica)
        room = allowance(budget) - self._ledger.spent(key_id, budget, self._wall()) - elsewhere
        vault.costs[replica] = max(0, min(ask.cost, room))
        self._unwritten |= not self._ledger.promise(key_id, budget, sum(vault.costs.values()), self._wall())
        return vault.costs[replica], vault.costs[replica] < ask.cost

    def _vault(self, key_id: str, limits: LimitsSpec) -> _Vault:
        vault = self._vaults.get(key_id)
        if vault is None:
            span_s = SPAN_S + LEASE_S
            vault = self._vaults[key_id] = _Vault(
                Window(limits.requests_per_minute, span_s), Window(limits.tokens_per_minute, span_s)
            )
        vault.requests.limit, vault.tokens.limit = limits.requests_per_minute, limits.tokens_per_minute
        vault.limits = limits
        return vault

    def _forget_silent(self, now: float) -> None:
        silent = [replica for replica, heard in self._heard.items() if now - heard > SILENT_S]
        for replica in silent:
            del self._heard[replica]
            for key_id, vault in self._vaults.items():
                vault.places.pop(replica, None)
                lost = vault.costs.pop(replica, 0)
                if vault.limits.budget is not None:
                    self._ledger.add(key_id, vault.limits.budget, lost, self._wall())
