"""What a key may do: requests and tokens a minute, requests at a time, a budget. O(1), on one thread, nothing awaited.

Prompt and `max_tokens` are reserved before a request is taken and settled after it: what was not used goes back into the
second it was taken from, and what drafts and the judge used beyond it is charged. `Limiter` is for one process; several
replicas share a key's limits through `leased.py`, which has accounts of its own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tigerbot.spec.access import AccessSpec, BudgetSpec, LimitsSpec
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.keys import Key
from tigerbot_serve.gateway.ledger import Ledger, Tokens, allowance, cost, period_left_s
from tigerbot_serve.gateway.windows import Window, duration


@dataclass
class Reservation:
    """What a request holds of its key's limits. `tokens` and `cost` are what was reserved."""

    account: Account
    tokens: int
    cost: int
    slot: int = 0
    settled: bool = False


@dataclass(frozen=True)
class Standing:
    """Where a key stands in its limits, for the headers of an answer."""

    requests_left: int
    tokens_left: int
    requests_reset_s: float
    tokens_reset_s: float


class Account(Protocol):
    """A key's limits and what is taken of them."""

    limits: LimitsSpec

    def change(self, limits: LimitsSpec) -> None:
        """Other limits from now on; what was taken stays taken."""
        ...

    def reserve(self, tokens: int, spends: int) -> Reservation:
        """Take one request, its tokens and its cost, or raise ApiError 429 and take nothing."""
        ...

    def settle(self, held: Reservation, tokens: int, spent: int) -> None:
        """End a request that used this many tokens. A second call does nothing."""
        ...

    def standing(self) -> Standing: ...


class LocalAccount:
    """A key that one process serves.

    Args:
        clock: monotonic seconds, for what is counted per minute.
        wall: seconds since the epoch, for days and months.
    """

    def __init__(
        self, key_id: str, limits: LimitsSpec, ledger: Ledger, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self.key_id, self.limits = key_id, limits
        self._ledger, self._clock, self._wall = ledger, clock, wall
        self._requests = Window(limits.requests_per_minute)
        self._tokens = Window(limits.tokens_per_minute)
        self._running = self._promised = self._waiting = 0

    def change(self, limits: LimitsSpec) -> None:
        if limits.budget != self.limits.budget:
            self._promised = 0
            self._promise()
        self.limits = limits
        self._requests.limit, self._tokens.limit = limits.requests_per_minute, limits.tokens_per_minute

    async def ready(self, spends: int) -> None:
        """Until the budget's file covers such a request, if the budget does."""
        budget = self.limits.budget
        self._waiting += spends
        try:
            while budget is not None and self._affords(budget, spends) and not self._promise():
                await asyncio.to_thread(self._ledger.write)
        finally:
            self._waiting -= spends

    def reserve(self, tokens: int, spends: int) -> Reservation:
        try:
            return self._reserved(tokens, spends)
        except ApiError:
            self._promise()  # what it got ready for is not to be
            raise

    def settle(self, held: Reservation, tokens: int, spent: int) -> None:
        if held.settled:
            return
        held.settled, now = True, self._clock()
        self._running -= 1
        self._promised = max(0, self._promised - held.cost)
        if tokens <= held.tokens:
            self._tokens.give_back(held.tokens - tokens, held.slot, now)
        else:
            self._tokens.charge(tokens - held.tokens, now)
        if self.limits.budget is not None:
            self._ledger.add(self.key_id, self.limits.budget, spent, self._wall())
            self._promise()

    def standing(self) -> Standing:
        now = self._clock()
        return Standing(
            self._requests.left(now), self._tokens.left(now), self._requests.reset_s(now), self._tokens.reset_s(now)
        )

    def _reserved(self, tokens: int, spends: int) -> Reservation:
        now, limits = self._clock(), self.limits
        if self._running >= limits.concurrent:
            raise too_many_at_once(limits)
        if self._requests.left(now) < 1:
            raise no_requests(limits, self._requests.wait_s(1, now))
        if self._tokens.left(now) < tokens:
            raise no_tokens(limits, tokens, self._tokens.wait_s(tokens, now))
        if limits.budget is not None and not self._affords(limits.budget, spends):
            raise no_budget(limits.budget, self._wall())
        self._running += 1
        self._promised += spends
        self._requests.charge(1, now)
        return Reservation(self, tokens, spends, self._tokens.charge(tokens, now))

    def _affords(self, budget: BudgetSpec, more: int) -> bool:
        spent = self._ledger.spent(self.key_id, budget, self._wall())
        return spent + self._promised + more <= allowance(budget)

    def _promise(self) -> bool:
        """Tell the ledger what is under way; whether its file knows."""
        budget = self.limits.budget
        promised = self._promised + self._waiting
        return budget is None or self._ledger.promise(self.key_id, budget, promised, self._wall())


class Limiter:
    """The accounts of one process.

    Args:
        ledger: what was spent before; it is closed here.
    """

    def __init__(
        self,
        spec: AccessSpec,
        ledger: Ledger | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.spec, self._ledger = spec, ledger or Ledger()
        self._clock, self._wall = clock, wall
        self._accounts: dict[str, tuple[Key, Account]] = {}

    async def ready(self, key: Key, tokens: Tokens) -> None:
        """Let what `reserve` needs be there: call it just before."""
        account = self.account(key)
        if isinstance(account, LocalAccount):
            await account.ready(cost(tokens, account.limits.budget, self.spec.price_per_1k))

    def reserve(self, key: Key, tokens: Tokens) -> Reservation:
        """Take a request and at most these tokens.

        Raises:
            ApiError: 429, a limit or the budget is reached; nothing was taken.
        """
        account = self.account(key)
        return account.reserve(tokens.total, cost(tokens, account.limits.budget, self.spec.price_per_1k))

    def settle(self, held: Reservation, tokens: Tokens) -> None:
        """What a request really used. A second call does nothing."""
        budget = held.account.limits.budget
        held.account.settle(held, tokens.total, cost(tokens, budget, self.spec.price_per_1k))

    def headers(self, key: Key) -> list[tuple[bytes, bytes]]:
        """OpenAI's rate-limit headers."""
        account = self.account(key)
        return headers_of(account.limits, account.standing())

    def account(self, key: Key) -> Account:
        known = self._accounts.get(key.id)
        if known is None:
            account = self._opened(key)
            self._accounts[key.id] = (key, account)
            return account
        if known[0] is not key:  # the key file was read again
            known[1].change(self.limits(key))
            self._accounts[key.id] = (key, known[1])
        return known[1]

    def limits(self, key: Key) -> LimitsSpec:
        """The spec's limits with what the key has of its own."""
        if key.limits is None:
            return self.spec.limits
        own = {name: value for name, value in vars(key.limits).items() if value is not None}
        return self.spec.limits.model_copy(update=own)

    def close(self) -> None:
        """Write down what was spent."""
        self._ledger.close()

    def _opened(self, key: Key) -> Account:
        return LocalAccount(key.id, self.limits(key), self._ledger, self._clock, self._wall)


def headers_of(limits: LimitsSpec, standing: Standing) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-requests", b"%d" % limits.requests_per_minute),
        (b"x-ratelimit-limit-tokens", b"%d" % limits.tokens_per_minute),
        (b"x-ratelimit-remaining-requests", b"%d" % max(0, standing.requests_left)),
        (b"x-ratelimit-remaining-tokens", b"%d" % max(0, standing.tokens_left)),
        (b"x-ratelimit-reset-requests", duration(standing.requests_reset_s).encode()),
        (b"x-ratelimit-reset-tokens", duration(standing.tokens_reset_s).encode()),
    ]


def retry_headers(seconds: float) -> dict[str, str]:
    """When to come back, for clients that read whole seconds and for those that read milliseconds."""
    wait_s = max(0.001, seconds)
    return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}


def no_requests(limits: LimitsSpec, wait_s: float) -> ApiError:
    return _limited(f"{limits.requests_per_minute:,} requests a minute", wait_s)


def no_tokens(limits: LimitsSpec, tokens: int, wait_s: float) -> ApiError:
    if tokens > limits.tokens_per_minute:
        return ApiError(
            429,
            f"this request may use {tokens:,} tokens, more than the key's {limits.tokens_per_minute:,} tokens a minute; "
            "ask for fewer max_tokens",
            code="rate_limit_exceeded",
            headers={"x-should-retry": "false"},
        )
    return _limited(f"{limits.tokens_per_minute:,} tokens a minute (this request may use {tokens:,})", wait_s)


def too_many_at_once(limits: LimitsSpec) -> ApiError:
    return _limited(f"{limits.concurrent} requests at a time", 1.0)


def no_budget(budget: BudgetSpec, now: float) -> ApiError:
    size = f"{budget.tokens:,} tokens" if budget.tokens is not None else f"{budget.money:g} in money"
    return ApiError(
        429,
        f"the key's budget of {size} a {budget.per} does not cover this request",
        code="insufficient_quota",
        headers=retry_headers(period_left_s(now, budget.per)) | {"x-should-retry": "false"},
    )


def _limited(limit: str, wait_s: float) -> ApiError:
    message = f"the key's limit of {limit} is reached; try again in {duration(wait_s)}"
    return ApiError(429, message, code="rate_limit_exceeded", headers=retry_headers(wait_s))
