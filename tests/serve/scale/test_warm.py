"""A replica's engine is warm before anybody asks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.scale.warm import buckets, warm


def test_every_bucket_of_rows_is_decoded_once_and_nothing_stays(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("lora", engine={"slots": 5, "max_length": 64})

    warm(engine)

    stats = engine.stats()
    assert (stats.slots_used, stats.queued, stats.outstanding_tokens) == (0, 0, 0)
    assert stats.tokens_decoded >= sum(buckets(5))


def test_buckets_are_powers_of_two_and_the_slots() -> None:
    assert buckets(1) == [1]
    assert buckets(5) == [1, 2, 4, 5]
    assert buckets(16) == [1, 2, 4, 8, 16]


def test_an_engine_that_cannot_decode_is_not_healthy(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("alone", engine={"slots": 1, "max_length": 64})

    def broken(*_: object) -> None:
        raise ValueError("no kernel")

    monkeypatch.setattr(engine.stepper, "_decode", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        warm(engine)
