"""Whose prompt is read when: a long one holds nobody up, the judge reads beside, nobody starves."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

from tigerbot_serve.engine.request import FinishEvent, Request, TokenEvent
from tigerbot_serve.engine.scheduler import Lane, Prefill, Scheduler


def ticket(**request: Any) -> Any:
    asked = SimpleNamespace(tenant="", prompt_logprobs=None, **request)
    return SimpleNamespace(current=SimpleNamespace(dial=0.5, prompt_ids=(1,)), request=asked)


def test_a_short_prompt_is_answered_while_a_long_one_is_read(engine_of) -> None:
    engine = engine_of("lora", engine={"max_length": 700, "prefill_chunk": 16})
    chance = random.Random(1)
    long, short = (tuple(chance.randrange(80, 400) for _ in range(size)) for size in (600, 12))

    async def story() -> list[str]:
        order = []

        async def first_token(name: str, ids: tuple[int, ...]) -> None:
            handle = engine.submit(Request(ids, 2, 0.5), asyncio.get_running_loop())
            async for event in handle:
                if isinstance(event, TokenEvent):
                    order.append(name)
                    break
            assert isinstance([event async for event in handle][-1], FinishEvent)

        begun = asyncio.create_task(first_token("long", long))
        await asyncio.sleep(0)
        await asyncio.gather(begun, *(first_token("short", short) for _ in range(3)))
        return order

    assert asyncio.run(asyncio.wait_for(story(), 60)) == ["short"] * 3 + ["long"]


def test_a_step_is_shared_by_the_lanes_that_have_work() -> None:
    scheduler = Scheduler(slots=4, max_queue=4, chunk=64)
    assert scheduler.shares() == {}

    scheduler.prefill(Prefill(ticket(), tuple(range(200))))
    assert scheduler.shares() == {Lane.LONG: 64}

    scheduler.prefill(Prefill(ticket(), (1, 2)))
    scheduler.prefill(Prefill(ticket(), (1, 2, 3), reading=object()))  # type: ignore[arg-type]
    assert scheduler.shares() == {Lane.SHORT: 32, Lane.LONG: 24, Lane.JUDGE: 8}


def test_one_reading_serves_all_choices_of_a_prompt_and_nobody_else() -> None:
    scheduler = Scheduler(slots=8, max_queue=8, chunk=64)
    first, twin, other = (Prefill(ticket(), ids) for ids in ((1, 2), (1, 2), (1, 3)))
    judged = Prefill(ticket(), (1, 2), reading=object())  # type: ignore[arg-type]
    for work in (first, other, twin, judged):
        scheduler.prefill(work)

    scheduler.prefilled(first)

    assert first.twins == [twin.ticket]
    assert scheduler.next_prefill(Lane.SHORT) is other and scheduler.next_prefill(Lane.JUDGE) is judged
