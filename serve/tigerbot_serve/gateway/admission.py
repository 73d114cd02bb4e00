"""Whether a replica takes one more request: by the tokens that stand before it, not by the number of requests.

What is refused is told when to come back: the tokens above the budget over the pace at which tokens have been leaving,
with some jitter so that not all come back at once. The engine is asked at most once in a while, not for every request.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.request import EngineStats
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.limits import retry_headers

ASK_EVERY_S = 0.05
ASK_AGAIN_S = 0.01  # before somebody is refused
PACE_OVER_S = 5.0
MAX_WAIT_S = 60.0


class Admission:
    """Outstanding tokens against a budget.

    Args:
        stats: the engine's.
        budget: tokens that may be outstanding. A request finds an idle engine open whatever its size.
        jitter: gives a number from 0 to 1.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        budget: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._stats, self.budget, self._clock, self._jitter = stats, budget, clock, jitter
        self._asked = -math.inf
        self._there = self._since = 0
        self._pace = 0.0

    def check(self, tokens: int) -> None:
        """Raise ApiError 429 where these tokens are too many now."""
        now = self._clock()
        if now - self._asked >= ASK_EVERY_S:
            self._ask(now)
        if self._fits(tokens):
            return
        if now - self._asked >= ASK_AGAIN_S:
            self._ask(now)
            if self._fits(tokens):
                return
        wait_s = self.wait_s(tokens)
        raise ApiError(
            429,
            f"the server has {self._there + self._since:,} tokens before this request; try again in {wait_s:.0f} s",
            code="overloaded",
            headers=retry_headers(wait_s),
        )

    def took(self, tokens: int) -> None:
        """A request was given to the engine."""
        self._since += tokens

    def wait_s(self, tokens: int) -> float:
        """Seconds until these tokens fit at the pace of the last seconds, 1 to 60, with up to a quarter of jitter."""
        above = self._there + self._since + tokens - self.budget
        seconds = math.ceil(above / max(1.0, self._pace))
        return min(MAX_WAIT_S, max(1, seconds) * (1 + 0.25 * self._jitter()))

    def _fits(self, tokens: int) -> bool:
        before = self._there + self._since
        return before == 0 or before + tokens <= self.budget

    def _ask(self, now: float) -> None:
        there = self._stats().outstanding_tokens
        passed = now - self._asked
        before = self._there + self._since
        if before and math.isfinite(passed):
            pace = max(0, before - there) / passed
            share = 1 - math.exp(-passed / PACE_OVER_S) if self._pace else 1.0
            self._pace += share * (pace - self._pace)
        self._asked, self._there, self._since = now, there, 0


def budget_of(spec: ServeSpec, max_length: int) -> int:
    """The spec's budget; auto is eight times what the slots can hold."""
    wanted = spec.access.max_outstanding_tokens
    return 8 * spec.engine.slots * max_length if wanted == "auto" else wanted
