"""An endpoint under load for a while: memory, open files and slots stay where they are. TIGER_SOAK_MINUTES sets how long."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.scale.warm import warm

MINUTES = float(os.environ.get("TIGER_SOAK_MINUTES", "3"))
CLIENTS = 8


@pytest.mark.soak
@pytest.mark.timeout(60 * (MINUTES + 20))
def test_memory_files_and_slots_are_flat_under_load(
    engine_of: Callable[..., Engine], spec_of_members: Callable[..., Any], world: Any
) -> None:
    # The cache of prefixes may fill up, as it is meant to: a small one is full before memory is looked at.
    engine = engine_of("lora", engine={"slots": 4, "max_length": 128, "prefix_cache_bytes": 8_000_000})
    warm(engine)
    app: Any = create_app(engine, spec_of_members(world.members("lora")), KeyRing())
    process = psutil.Process()
    asyncio.run(_load(app, seconds=max(20.0, 6 * MINUTES)))  # caches and arenas fill first
    memory, files = process.memory_info().rss, process.num_fds()

    answered = asyncio.run(_load(app, seconds=60 * MINUTES))

    until = time.monotonic() + 30
    while engine.stats().slots_used or engine.stats().queued:
        assert time.monotonic() < until, "a slot leaked"
        time.sleep(0.05)
    assert answered > 20 * MINUTES
    assert process.num_fds() <= files + 2
    assert process.memory_info().rss < memory + 40e6


async def _load(app: Any, seconds: float) -> int:
    transport = httpx.ASGITransport(app=app)
    until = time.monotonic() + seconds
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
        return sum(await asyncio.gather(*(_client(client, number, until) for number in range(CLIENTS))))


async def _client(client: httpx.AsyncClient, number: int, until: float) -> int:
    answered = 0
    while time.monotonic() < until:
        body = {
            "model": "tiger",
            "messages": [{"role": "user", "content": "fox " * (1 + answered % 9)}],
            "max_tokens": 1 + answered % 12,
            "stream": number % 2 == 0,
            "creativity": (number % 3) / 2,
            "verify": answered % 5 == 0,
        }
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        answered += 1
    return answered
