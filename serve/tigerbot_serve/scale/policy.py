"""How many replicas the outstanding tokens call for. Serve's controller calls this ten times a second.

Requests are no measure of load here: one may want 4,000 tokens and another four, and behind direct ingress Serve's
controller sees no queue at all. So every replica tells how many tokens it still owes. Serve puts bounds and delays
around the number. The module travels to the controller by value: it imports nothing but the standard library.
"""

from __future__ import annotations

import math
from typing import Any

METRIC = "outstanding_tokens"


class OutstandingTokens:
    """`ceil(outstanding tokens / target)`: up with the newest numbers, down with the window's mean.

    Args:
        target_tokens: what one replica should have before it.
    """

    def __init__(self, target_tokens: int) -> None:
        self.target_tokens = target_tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        newest = sum(series[-1].value for series in (context.raw_metrics or {}).get(METRIC, {}).values() if series)
        mean = sum((context.aggregated_metrics or {}).get(METRIC, {}).values())
        wanted = math.ceil(max(newest, mean) / self.target_tokens)
        # Somebody waits at a proxy for a replica that has no number yet, or is decoding what counts no tokens.
        return max(wanted, 1 if context.total_num_requests > 0 else 0), {}
