"""Whether a canary does worse than the rest, by numbers that chance alone would hardly give. Pure; the standard library.

Errors: the chance of so many among the canary's, were its rate the rest's (both known from samples: Fisher's exact
test, one-sided). Time: of its answers, how many are slower than the rest's p99 times a margin; one in a hundred is
expected, the binomial tail says how odd more are. An answer's time is per token, so that long ones are not slow ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SURE = 0.001  # of a false alarm, at one look
_KEPT = 2000  # newest times


@dataclass
class Tally:
    """What became of one side's answers."""

    answers: int = 0
    errors: int = 0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, seconds_per_token: float | None) -> None:
        """An answer; None for one that failed."""
        self.answers += 1
        if seconds_per_token is None:
            self.errors += 1
        else:
            self.times.append(seconds_per_token)


def together(tallies: Iterable[Tally]) -> Tally:
    """Of several replicas."""
    tallies = list(tallies)
    times = deque((time for one in tallies for time in one.times), maxlen=_KEPT * max(1, len(tallies)))
    return Tally(sum(one.answers for one in tallies), sum(one.errors for one in tallies), times)


def worse(canary: Tally, rest: Tally, *, min_answers: int, slower: float) -> str | None:
    """Why the canary is to be taken back, if it is."""
    if min(canary.answers, rest.answers) < min_answers:
        return None
    if fisher(canary.errors, canary.answers, rest.errors, rest.answers) < SURE:
        return f"errors {canary.errors / canary.answers:.1%} against {rest.errors / rest.answers:.1%}"
    if min(len(canary.times), len(rest.times)) < min_answers:
        return None
    limit = quantile(rest.times, 0.99) * slower
    over = sum(time > limit for time in canary.times)
    if binomial_tail(over, len(canary.times), 0.01) < SURE:
        p99 = quantile(canary.times, 0.99)
        return f"p99 {1000 * p99:.1f} ms a token against {1000 * limit / slower:.1f}"
    return None


def fisher(bad: int, answers: int, bad_rest: int, answers_rest: int) -> float:
    """The chance of at least `bad` of all the bad ones falling among `answers`, were they dealt at random."""
    all_bad, everyone = bad + bad_rest, answers + answers_rest
    whole = _log_choose(everyone, answers)
    return math.fsum(
        math.exp(_log_choose(all_bad, k) + _log_choose(everyone - all_bad, answers - k) - whole)
        for k in range(bad, min(all_bad, answers) + 1)
        if answers - k <= everyone - all_bad
    )


def binomial_tail(at_least: int, of: int, chance: float) -> float:
    """The chance of `at_least` or more successes."""
    return math.fsum(
        math.exp(_log_choose(of, k) + k * math.log(chance) + (of - k) * math.log1p(-chance))
        for k in range(at_least, of + 1)
    )


def quantile(found: Sequence[float], at: float) -> float:
    ordered = sorted(found)
    return ordered[min(len(ordered) - 1, math.ceil(at * len(ordered)) - 1)]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
