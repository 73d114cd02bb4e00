"""A replica's first tokens, decoded before anybody waits for them.

The first step of a batch size pays for what a library sets up once: kernels chosen, graphs captured, memory taken.
"""

from __future__ import annotations

import asyncio
import threading

from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request


def warm(engine: Engine) -> None:
    """Decode one step of 1, 2, 4, ... rows of a running engine.

    Raises:
        RuntimeError: it cannot decode.
    """
    errors: list[str] = []

    def decode() -> None:  # a thread of its own: the caller's may be inside a running event loop
        errors.extend(error for rows in buckets(engine.spec.slots) for error in asyncio.run(_together(engine, rows)))

    thread = threading.Thread(target=decode, name="tiger-warm")
    thread.start()
    thread.join()
    if any(errors):
        raise RuntimeError(f"the engine cannot decode: {next(filter(None, errors))}")


def buckets(slots: int) -> list[int]:
    """1, 2, 4, ... up to the slots, and the slots themselves."""
    return sorted({min(2**power, slots) for power in range(slots.bit_length() + 1)})


async def _together(engine: Engine, rows: int) -> list[str]:
    loop = asyncio.get_running_loop()
    request = Request(prompt_ids=(0, 0), max_tokens=2, dial=0.5, temperature=0.0, seed=0)
    return await asyncio.gather(*(_one(engine, request, loop) for _ in range(rows)))


async def _one(engine: Engine, request: Request, loop: asyncio.AbstractEventLoop) -> str:
    async for event in engine.submit(request, loop):
        if isinstance(event, FinishEvent):
            return event.error
    return ""
