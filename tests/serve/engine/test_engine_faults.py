"""What fails ends the requests it was about; slots come back whatever happens in whatever order."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from tigerbot_serve.engine.request import FinishEvent, Request
from tigerbot_serve.engine.scheduler import Lane


def some(chance: random.Random, size: int) -> tuple[int, ...]:
    return tuple(chance.randrange(80, 400) for _ in range(size))


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_without_memory_for_all_the_youngest_goes_and_the_others_stay(engine_of, ask, monkeypatch) -> None:
    chance = random.Random(1)
    asked = [Request(some(chance, 12), 16, 0.5, temperature=0.0) for _ in range(4)]
    good = [ask(engine_of("lora"), request)[0] for request in asked]
    engine = engine_of("lora")
    real = engine.members.forward

    def forward(caches, feeds):
        if len(feeds[0].ids) > 3:
            raise no_memory()
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    answers = ask(engine, *asked)

    ends = [answer.end.finish_reason for answer in answers]
    assert ends.count("memory") == 1 and "out of memory" in answers[ends.index("memory")].end.error
    for answer, alone in zip(answers, good, strict=True):
        if answer.end.finish_reason != "memory":
            assert answer.ids == alone.ids
    assert engine.alive and not engine.starved and engine.stats().slots_used == 0


def test_what_is_kept_for_later_prompts_goes_before_anybody_is_ended(engine_of, ask, monkeypatch) -> None:
    engine = engine_of("lora", engine={"max_length": 128})
    chance = random.Random(2)
    ask(engine, Request(some(chance, 64), 2, 0.5))
    real = engine.members.forward

    def forward(caches, feeds):
        if engine.stats().prefix_bytes:
            raise no_memory()
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    for size in (12, 64):
        assert ask(engine, Request(some(chance, size), 4, 0.5))[0].end.finish_reason == "length"


def test_a_prompt_that_fails_takes_nobody_with_it(engine_of, ask, monkeypatch) -> None:
    engine = engine_of("lora", engine={"max_length": 128})
    chance = random.Random(3)
    real = engine.members.forward

    def forward(caches, feeds):
        if 99 in feeds[0].ids[0]:
            raise RuntimeError("broken kernel")
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    fine = Request((100, *some(chance, 11)), 12, 0.5, temperature=0.0)
    answers = ask(engine, fine, Request((100, 99, 101), 4, 0.5, temperature=0.0), fine)

    assert [answer.end.finish_reason for answer in answers] == ["length", "error", "length"]
    assert "broken kernel" in answers[1].end.error


def test_a_held_answer_that_is_whole_is_given_when_there_is_no_memory_to_rewrite_it(
    engine_of, heads, ask, monkeypatch
) -> None:
    engine = engine_of("lora", heads=str(heads(p_dev=9.0)), judge={"threshold": 0.1})
    real, asked = engine.members.forward, Request((100, 101, 102), 6, 0.5, verify=True, max_rewrites=1)
    rewriting = []

    def forward(caches, feeds):
        running = engine.stepper.scheduler.running
        if running and running[0].rewrites and running[0].current.output_ids:
            rewriting.append(running[0].rewrites)
            raise no_memory()
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    answer = ask(engine, asked)[0]

    assert rewriting and answer.end.finish_reason == "length" and len(answer.ids) == 6
    assert answer.end.summary.verdict in ("flagged", "unverified")


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))])
def test_no_order_of_submitting_cancelling_failing_and_stepping_leaks_a_slot(
    engine_of, heads, monkeypatch, seed
) -> None:
    chance = random.Random(seed)
    options = {"slots": 3, "max_length": 96, "prefill_chunk": 12, "prefix_cache_bytes": chance.choice([0, 300_000])}
    engine = engine_of("lora", engine=options, heads=str(heads()), judge={"threshold": 0.4}, start=False)
    monkeypatch.setattr(type(engine), "alive", property(lambda self: True))
    real = engine.members.forward

    def forward(caches, feeds):
        if chance.random() < 0.05:
            raise chance.choice([no_memory(), RuntimeError("broken")])
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    trunk = some(chance, 40)

    async def story() -> list[FinishEvent]:
        handles = []
        with torch.inference_mode():
            for _ in range(120):
                event = chance.random()
                if event < 0.25:
                    verify = chance.random() < 0.4
                    request = Request(
                        trunk[: chance.randint(1, 40)] + some(chance, chance.randint(0, 8)),
                        chance.randint(1, 12),
                        chance.choice([0.0, 0.4, 0.6, 1.0]),
                        verify=verify,
                        max_rewrites=chance.randint(0, 2) * verify,
                        tenant=chance.choice("ab"),
                    )
                    handles += [
                        engine.submit(request, asyncio.get_running_loop()) for _ in range(chance.choice([1, 1, 2]))
                    ]
                elif event < 0.3 and handles:
                    chance.choice(handles).cancel()
                else:
                    engine.stepper.step()
            while engine.stats().slots_used or engine.stats().queued:
                engine.stepper.step()
        return [[event async for event in handle][-1] for handle in handles]  # type: ignore[misc]

    ends = asyncio.run(asyncio.wait_for(story(), 60))

    assert len({end.finish_reason for end in ends}) >= 2 and all(isinstance(end, FinishEvent) for end in ends)
    assert engine.stats().slots_used == engine.stats().queued == engine.stats().outstanding_tokens == 0
    assert not engine.stepper._rows.sequences
    assert all(engine.stepper.scheduler.next_prefill(lane) is None for lane in Lane)
