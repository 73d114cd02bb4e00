"""The limiter of a replica among several: it asks the bank for leases once a second, and when it is out of them.

No request calls the bank. The first one of a quiet key waits for one round; under load leases are renewed before they are
used up, all keys in one call. A bank that does not answer leaves each replica its equal share of every limit, counted
here, until it answers again: an endpoint does not stop because its counters did.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from tigerbot.spec.access import AccessSpec, LimitsSpec
from tigerbot_serve.gateway.bank import Ask, Grant
from tigerbot_serve.gateway.keys import Key
from tigerbot_serve.gateway.leased import LeasedAccount
from tigerbot_serve.gateway.ledger import Tokens, cost
from tigerbot_serve.gateway.limits import Account, Limiter, LocalAccount, Reservation
from tigerbot_serve.gateway.redact import without_values

log = logging.getLogger(__name__)

EVERY_S = 1.0
SPACING_S = 0.05
ANSWERS_WITHIN_S = 2.0

Sync = Callable[[dict[str, Ask]], Awaitable[Mapping[str, Grant]]]


class LeasedLimiter(Limiter):
    """Accounts of one replica whose limits all replicas share.

    Args:
        sync: tells the bank what this replica asks, and brings what it grants.
        replicas: how many there may be, for the time in which the bank does not answer.
    """

    def __init__(
        self,
        spec: AccessSpec,
        sync: Sync,
        *,
        replicas: int,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(spec, clock=clock, wall=wall)
        self._sync = sync
        self._leased: dict[str, LeasedAccount] = {}
        self._share = _Share(spec, replicas, clock, wall)
        self._alone = False
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Event | None = None
        self._next: asyncio.Future[None] | None = None

    async def ready(self, key: Key, tokens: Tokens) -> None:
        account = self._account(key)
        spends = cost(tokens, account.limits.budget, self.spec.price_per_1k)
        if account.covers(tokens.total, spends):
            if account.low and not account.refused:
                self._kick()
            return
        if account.refused:
            return
        account.want(tokens.total, spends)
        answered = self._kick()
        if self._alone:
            return
        try:
            await asyncio.wait_for(asyncio.shield(answered), ANSWERS_WITHIN_S + 1)
        except TimeoutError:
            log.error("no lease within %g s", ANSWERS_WITHIN_S + 1)

    def reserve(self, key: Key, tokens: Tokens) -> Reservation:
        if self._alone:
            return self._share.reserve(key, tokens)
        return super().reserve(key, tokens)

    def settle(self, held: Reservation, tokens: Tokens) -> None:
        if isinstance(held.account, LeasedAccount):
            super().settle(held, tokens)
            return
        assert isinstance(held.account, LocalAccount)
        leased = self._leased[held.account.key_id]
        if not held.settled:
            leased.used_unleased(tokens.total, cost(tokens, leased.limits.budget, self.spec.price_per_1k))
        self._share.settle(held, tokens)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        super().close()

    def _opened(self, key: Key) -> Account:
        account = self._leased[key.id] = LeasedAccount(self.limits(key), self._clock, self._wall)
        return account

    def _account(self, key: Key) -> LeasedAccount:
        account = self.account(key)
        assert isinstance(account, LeasedAccount)
        return account

    def _kick(self) -> asyncio.Future[None]:
        """Ask soon; the future is done when an ask that has not been made yet is answered."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.create_future()
        if self._wake is None:
            self._wake = asyncio.Event()
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        return self._next

    async def _run(self) -> None:
        """Ask until nothing is held."""
        assert self._wake is not None
        while any(not account.idle for account in self._leased.values()):
            self._wake.clear()
            answered, self._next = self._next, None
            await self._round()
            if answered is not None and not answered.done():
                answered.set_result(None)
            await asyncio.sleep(SPACING_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), EVERY_S - SPACING_S)

    async def _round(self) -> None:
        asks = {key_id: account.ask() for key_id, account in self._leased.items() if not account.idle}
        try:
            grants = await asyncio.wait_for(self._sync(asks), ANSWERS_WITHIN_S)
            for key_id, ask in asks.items():
                self._leased[key_id].granted(ask, grants[key_id])
        except Exception as error:
            for key_id, ask in asks.items():
                self._leased[key_id].failed(ask)
            if not self._alone:
                log.error("limits are not shared for now, each replica takes its part: %s", without_values(error))
            self._alone = True
            return
        if self._alone:
            log.warning("limits are shared again")
        self._alone = False


class _Share(Limiter):
    """An equal part of every limit. What is spent is reported to the bank when it answers again."""

    def __init__(self, spec: AccessSpec, replicas: int, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        super().__init__(spec, clock=clock, wall=wall)
        self._replicas = replicas

    def limits(self, key: Key) -> LimitsSpec:
        whole = super().limits(key)
        return LimitsSpec(
            requests_per_minute=max(1, whole.requests_per_minute // self._replicas),
            tokens_per_minute=max(1, whole.tokens_per_minute // self._replicas),
            concurrent=max(1, whole.concurrent // self._replicas),
        )
