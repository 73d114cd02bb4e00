"""Prompts that begin as earlier ones did are not read again, and nobody can tell from the answer."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from tigerbot_serve.engine.prefix import BLOCK, PrefixCache
from tigerbot_serve.engine.request import FinishEvent, Request
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL

SYSTEM = "The fox sings in the river at night. 狐狸在河边唱歌。细雨落下，月亮等待。Rain falls on the old town." * 2


def some(chance: random.Random, size: int) -> tuple[int, ...]:
    return tuple(chance.randrange(80, 400) for _ in range(size))


def cached(answer) -> int:
    return answer.end.usage.cached_tokens


def numbers(answer) -> list[float]:
    return [token.logprob for token in answer.tokens]


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_answers_are_the_same_with_and_without_the_cache(kind, engine_of, ask) -> None:
    chance = random.Random(5)
    trunk = some(chance, 70)
    prompts = []
    for _ in range(12):
        base = chance.choice([trunk, *prompts])[: chance.choice([15, 16, 17, 32, 48, 70, 90])]
        prompts.append(base + some(chance, chance.choice([0, 1, 7, 20])))
    dials = [chance.choice([0.0, 0.3, 0.7, 1.0]) for _ in prompts]
    asked = [Request(p, 6, d, temperature=0.0) for p, d in zip(prompts, dials, strict=True)]
    sizes = {"max_length": 128, "prefill_chunk": 24}
    fresh = engine_of(kind, engine=sizes | {"prefix_cache_bytes": 0})
    reusing = engine_of(kind, engine=sizes)

    plain = [ask(fresh, request)[0] for request in asked]  # at once, equal prompts would be read as one
    reused = [ask(reusing, request)[0] for request in asked] + ask(reusing, *asked)

    assert sum(map(cached, reused[: len(asked)])) > 60 and not any(map(cached, plain))
    for one, other in zip(plain * 2, reused, strict=True):
        assert one.ids == other.ids
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)


def test_the_next_turn_of_a_chat_reads_neither_the_prompt_nor_the_answer_again(engine_of, ask) -> None:
    engine = engine_of("lora")
    prompt = some(random.Random(1), 40)
    first = ask(engine, Request(prompt, 20, 0.4, temperature=0.9, seed=3))[0]

    said = (*prompt, *first.ids)
    second = ask(engine, Request((*said, 90, 91), 4, 0.4, temperature=0.0))[0]

    assert cached(second) == (len(said) - 1) // BLOCK * BLOCK


def test_one_side_alone_is_read_and_kept_at_an_end_of_the_dial(engine_of, ask) -> None:
    engine = engine_of("lora", engine={"max_length": 128, "prefill_chunk": 16})
    prompt = some(random.Random(2), 60)
    ask(engine, Request(prompt, 1, 0.0, temperature=0.0))

    mixed = ask(engine, Request(prompt, 8, 0.5, temperature=0.0))[0]

    assert cached(mixed) == 0  # the creative side had to read all of it
    fresh = ask(engine_of("lora", engine={"max_length": 128, "prefix_cache_bytes": 0}), Request(prompt, 8, 0.5, 0.0))
    assert mixed.ids == fresh[0].ids
    assert numbers(mixed) == pytest.approx(numbers(fresh[0]), abs=1e-5)


def test_tenants_find_what_is_public_and_nothing_of_each_other(engine_of, ask, tokenizer) -> None:
    engine = engine_of("lora", engine={"max_length": 256, "public_prefix": SYSTEM})
    system = tuple(tokenizer.encode(SYSTEM, add_special_tokens=False, split_special_tokens=True))
    own = some(random.Random(3), 40)
    whole_blocks = len(system) // BLOCK * BLOCK
    assert whole_blocks >= 2 * BLOCK

    found = [cached(ask(engine, Request(system + own, 2, 0.5, temperature=0.0, tenant=tenant))[0]) for tenant in "aba"]

    assert found == [0, whole_blocks, (len(system + own) - 1) // BLOCK * BLOCK]
    assert cached(ask(engine, Request(own, 2, 0.5, tenant="b"))[0]) == 0


def test_a_prompt_of_several_choices_is_read_once(engine_of, ask, monkeypatch) -> None:
    hot = {"plausibility": 0.0}
    engine = engine_of("lora", engine={"max_length": 128}, dial=hot, start=False)
    fed, real = [], engine.members.forward

    def forward(caches, feeds):
        fed.append(len(feeds[0].ids[0]) if feeds[0].ids else 0)
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    engine.start()
    prompt = some(random.Random(4), 50)

    answers = ask(engine, *(Request(prompt, 6, 0.5, temperature=2.0, seed=seed) for seed in range(4)))

    assert sum(size for size in fed if size > 1) <= 50 + 3  # a late one reads what is left of the last block
    assert len({tuple(answer.ids) for answer in answers}) > 1
    alone = ask(engine_of("lora", dial=hot), Request(prompt, 6, 0.5, temperature=2.0, seed=2))[0]
    assert answers[2].ids == alone.ids


def test_a_judged_answer_is_read_with_the_prompt_known_and_judged_the_same(engine_of, ask, heads) -> None:
    chance = random.Random(6)
    folder = str(heads(w_dev=torch.randn(257, generator=torch.Generator().manual_seed(1)) * 0.3))
    request = Request(some(chance, 50), 20, 0.4, temperature=0.8, seed=5, verify=True, max_rewrites=1, want_tokens=True)
    judge = {"threshold": 0.3}

    fresh, reusing = (
        engine_of("lora", heads=folder, judge=judge, engine={"max_length": 128, "prefix_cache_bytes": size})
        for size in (0, 10**8)
    )
    plain, known = ask(fresh, request)[0], ask(reusing, request)[0]

    assert known.ids == plain.ids
    assert known.end.usage.judge_tokens == plain.end.usage.judge_tokens > 50
    assert known.end.summary.verdict == plain.end.summary.verdict
    theirs = [token.p_dev for token in plain.tokens]
    assert [token.p_dev for token in known.tokens] == pytest.approx(theirs, abs=1e-4)
    assert reusing.stats().prefix_tokens_reused > 0


def test_a_cancelled_prompt_leaves_nothing_wrong_behind(engine_of, ask) -> None:
    engine = engine_of("lora", engine={"max_length": 600, "prefill_chunk": 8})
    prompt = some(random.Random(7), 500)

    async def story() -> FinishEvent:
        handle = engine.submit(Request(prompt, 4, 0.5, temperature=0.0), asyncio.get_running_loop())
        while engine.stats().steps < 3:
            await asyncio.sleep(0.001)
        handle.cancel()
        return [event async for event in handle][-1]  # type: ignore[return-value]

    assert asyncio.run(asyncio.wait_for(story(), 30)).finish_reason == "cancelled"
    after = ask(engine, Request(prompt[:40], 8, 0.5, temperature=0.0))[0]

    fresh = ask(
        engine_of("lora", engine={"max_length": 128, "prefix_cache_bytes": 0}), Request(prompt[:40], 8, 0.5, 0.0)
    )
    assert after.ids == fresh[0].ids


def test_the_oldest_text_leaves_first_and_from_its_end(engine_of) -> None:
    members = engine_of("lora", start=False).members
    caches = members.caches(1, 128)
    block = caches.read(CREATIVE, 0, 0, BLOCK).nbytes
    cache = PrefixCache(members.hashes, 5 * block)
    old, new = tuple(range(100, 164)), tuple(range(200, 248))

    cache.store(CREATIVE, "", old, caches)
    cache.store(CREATIVE, "", new, caches)

    assert cache.bytes == 5 * block
    assert cache.restore(CREATIVE, "", new, caches) == 48
    assert cache.restore(CREATIVE, "", old, caches) == 32
    assert cache.restore(FACTUAL, "", new, caches) == 0


def test_blocks_come_back_as_they_were(engine_of) -> None:
    members = engine_of("full", start=False).members
    caches, other = members.caches(2, 64), members.caches(1, 64)
    cache = PrefixCache(members.hashes, 10**8)
    ids = tuple(range(100, 148))
    for stack in caches.of_stack:
        for layer in (*stack.keys, *stack.values):
            layer.normal_()

    cache.store(FACTUAL, "t", ids, caches, index=1)

    assert cache.restore(FACTUAL, "t", ids[:40], other) == 32
    assert torch.equal(other.read(FACTUAL, 0, 0, 32), caches.read(FACTUAL, 1, 0, 32))
