"""A limit per minute that is never exceeded: what is taken comes back when it is older than the span.

A bucket that refills evenly lets twice its limit through in the minute after a quiet one. This one counts what was taken
in slots of a second, so that no 60 seconds hold more than the limit, and knows exactly when there is room again. A refund
goes back into the slot it was taken from. Every call is O(1) but the answer to a refusal. Integers only: refunds are exact.
"""

from __future__ import annotations

SPAN_S = 60


class Window:
    """At most `limit` in any `span_s` seconds.

    Args:
        span_s: whole seconds. Of the slot that is neither wholly in nor wholly out of the span, all is counted.
    """

    def __init__(self, limit: int, span_s: int = SPAN_S) -> None:
        self.limit, self._span = limit, span_s
        self._size = span_s + 1
        self._slots = [0] * self._size
        self._newest = -1
        self._last = -self._size  # the newest slot from which something was taken
        self._used = 0

    def left(self, now: float) -> int:
        """What may be taken; below zero where more was charged than was reserved."""
        self._advance(int(now))
        return self.limit - self._used

    def take(self, amount: int, now: float) -> int | None:
        """Take all of it and return the slot for `give_back`, or take nothing and return None."""
        if amount > self.left(now):
            return None
        return self.charge(amount, now)

    def charge(self, amount: int, now: float) -> int:
        """Take it whether it is there or not: tokens that are spent already."""
        slot = int(now)
        self._advance(slot)
        slot = max(slot, self._newest)  # a clock that goes back does not open old slots again
        self._slots[slot % self._size] += amount
        self._used += amount
        if amount:
            self._last = slot
        return slot

    def give_back(self, amount: int, slot: int, now: float) -> None:
        """Undo a part of what was taken; what has come back by itself is not given twice."""
        self._advance(int(now))
        if slot > self._newest - self._size:
            self._slots[slot % self._size] -= amount
            self._used -= amount

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until `amount` can be taken if nobody else takes; infinite where it never can."""
        missing = amount - self.left(now)
        if missing <= 0:
            return 0.0
        if amount > self.limit:
            return float("inf")
        for slot in range(self._newest - self._span, self._newest + 1):
            missing -= self._slots[slot % self._size]
            if missing <= 0:
                return slot + self._size - now
        return float(self._size)

    def reset_s(self, now: float) -> float:
        """Seconds until the limit is whole again."""
        return max(0.0, self._last + self._size - now) if self.left(now) < self.limit else 0.0

    def _advance(self, slot: int) -> None:
        if slot <= self._newest:
            return
        for passed in range(max(self._newest + 1, slot - self._span), slot + 1):
            self._used -= self._slots[passed % self._size]
            self._slots[passed % self._size] = 0
        self._newest = slot


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers write them: `0s`, `120ms`, `1s`, `6m0s`, `1h0m0s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{max(1, round(seconds * 1000))}ms"
    whole = int(-(-seconds // 1))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
