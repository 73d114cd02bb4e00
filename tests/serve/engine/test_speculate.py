"""Drafted by one member and verified by the other, answers are distributed as the plain ensemble's."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tigerbot.spec import DialSpec
from tigerbot_serve.engine.request import FinishEvent, Request
from tigerbot_serve.engine.sampler import draw, weigh
from tigerbot_serve.engine.speculate import settle
from tigerbot_serve.ensemble.dial import mix

DRAWS, WORDS = 100_000, 5
SPECULATE = {"max_length": 128, "speculate": {"tokens": 4}}


def some(chance: random.Random, size: int) -> tuple[int, ...]:
    return tuple(chance.randrange(80, 400) for _ in range(size))


def tables(kind: str, weight: float, heat: float, floor: float, top_p: float) -> tuple[Tensor, Tensor]:
    """What the drafter and the mixture draw from after each word (V, V): one-token memories for models."""
    make = torch.Generator().manual_seed(4)
    own, other = (torch.log_softmax(torch.randn(WORDS, WORDS, generator=make) * 1.2, dim=-1) for _ in range(2))
    mixed = mix(other, own, torch.full((WORDS,), weight), DialSpec.model_validate({"mix": kind}))
    heats, shares = torch.full((WORDS,), heat), [top_p] * WORDS
    both = [weigh(logprobs, heats, shares, floor).double() for logprobs in (own, mixed)]
    return tuple(weights / weights.sum(-1, keepdim=True) for weights in both)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["geometric", "linear"])
@pytest.mark.parametrize(
    ("weight", "heat", "floor", "top_p"), [(0.3, 1.0, 0.0, 1.0), (0.5, 1.3, 0.1, 1.0), (0.4, 0.8, 0.0, 0.9)]
)
def test_triples_of_tokens_have_the_plain_mixtures_frequencies(kind, weight, heat, floor, top_p) -> None:
    own, target = tables(kind, weight, heat, floor, top_p)
    make = torch.Generator().manual_seed(1)

    def uniform() -> Tensor:
        return torch.rand(DRAWS, dtype=torch.float64, generator=make)

    drafted = [torch.zeros(DRAWS, dtype=torch.long)]
    for _ in range(3):
        drafted.append(draw(own[drafted[-1]], uniform()))
    words, alive = [drafted[0]], torch.ones(DRAWS, dtype=torch.bool)
    for before, token in pairwise(drafted):
        settled, kept = settle(own[before], target[before], token, uniform(), uniform())
        plain = draw(target[words[-1]], uniform())  # after a refusal the next cycle begins: here, plainly
        words.append(torch.where(alive, settled, plain))
        alive &= kept

    assert 0.05 < float(alive.double().mean()) < 0.95
    found = torch.bincount(words[1] * WORDS**2 + words[2] * WORDS + words[3], minlength=WORDS**3)
    wanted = (target[0][:, None, None] * target[:, :, None] * target[None]).flatten()
    assert int(found[wanted == 0].sum()) == 0
    kept_cells = wanted * DRAWS >= 5
    counts = torch.cat([found[kept_cells], found[~kept_cells].sum()[None]]).double()
    expected = torch.cat([wanted[kept_cells], wanted[~kept_cells].sum()[None]]) * DRAWS
    full = expected > 0
    assert chisquare(counts[full].numpy(), expected[full].numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("mix_kind", "kind"),
    [
        ("geometric", "lora"),
        ("linear", "full"),
        pytest.param("linear", "lora", marks=pytest.mark.soak),
        pytest.param("geometric", "full", marks=pytest.mark.soak),
    ],
)
def test_greedy_answers_and_their_numbers_are_the_plain_ensembles(mix_kind, kind, engine_of, ask, heads) -> None:
    chance = random.Random(3)
    dial = {"mix": mix_kind, "a": 0.2, "b": 0.2}
    weights = torch.randn(257, generator=torch.Generator().manual_seed(1)) * 0.1
    fields = {"heads": str(heads(w_dev=weights))} if kind == "lora" else {}
    asked = [
        Request(some(chance, 9 + i), 18 + i, dial, temperature=0.0, want_tokens=True)
        for i, dial in enumerate((0.1, 0.4, 0.6, 0.9))
    ]
    plain = engine_of(kind, dial=dial, engine={"max_length": 128}, **fields)
    fast = engine_of(kind, dial=dial, engine=SPECULATE, **fields)

    expected = ask(plain, *asked)
    found = [answer for pair in (asked[:2], asked[2:3], asked[3:]) for answer in ask(fast, *pair)]

    for one, other in zip(expected, found, strict=True):
        assert one.ids == other.ids
        for name in ("logprob", "w", "p_div", "p_dev"):
            mine, theirs = ([getattr(token, name) for token in a.end.summary.tokens] for a in (one, other))
            assert mine == (pytest.approx(theirs, abs=1e-4) if None not in theirs else theirs)
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-5)
    assert fast.stats().tokens_drafted > fast.stats().drafts_kept > 0


def test_members_that_agree_take_one_pass_of_the_second_for_a_whole_draft(engine_of, ask) -> None:
    engine = engine_of("alike", engine=SPECULATE)
    request = Request(some(random.Random(4), 10), 33, 0.4, temperature=0.7, seed=3)

    answer = ask(engine, request)[0]

    stats = engine.stats()
    assert len(answer.ids) == 33 and stats.drafts_kept == stats.tokens_drafted > 20
    assert stats.steps <= 10  # the prompt's, and cycles of four tokens


def test_a_seed_is_a_text_within_the_mode(engine_of, ask) -> None:
    chance = random.Random(5)
    engine = engine_of("full", engine=SPECULATE, dial={"plausibility": 0.0})
    mine = Request(some(chance, 9), 24, 0.3, temperature=1.5, seed=11)
    beside = Request(some(chance, 30), 40, 0.7, temperature=1.0, seed=1)

    alone, again, paired = ask(engine, mine)[0], ask(engine, mine)[0], ask(engine, mine, beside)[0]

    assert alone.ids == again.ids == paired.ids
    assert ask(engine, Request(mine.prompt_ids, 24, 0.3, temperature=1.5, seed=12))[0].ids != alone.ids


def test_sequences_that_come_and_go_change_the_mode_and_nothing_else(engine_of, heads) -> None:
    """Three greedy answers of different lengths beside each other, begun at different times."""
    chance = random.Random(6)
    asked = [
        Request(some(chance, 10), size, dial, temperature=0.0) for size, dial in ((40, 0.3), (12, 0.6), (25, 0.45))
    ]

    async def staggered(engine) -> list[list[int]]:
        async def one(request: Request, after: int) -> list[int]:
            while engine.stats().tokens_decoded < after:
                await asyncio.sleep(0.001)
            events = [event async for event in engine.submit(request, asyncio.get_running_loop())]
            assert isinstance(events[-1], FinishEvent)
            return [event.token_id for event in events[:-1]]

        return list(
            await asyncio.gather(*(one(request, after) for request, after in zip(asked, (0, 4, 9), strict=True)))
        )

    folder = str(heads(hidden=4))
    plain, mixed = (
        asyncio.run(
            asyncio.wait_for(staggered(engine_of("lora", heads=folder, dial={"mix": "linear"}, engine=engine)), 60)
        )
        for engine in ({"max_length": 128}, SPECULATE | {"gate": {"min_run": 2}})
    )

    assert mixed == plain


def test_limits_and_ends_of_answers_hold_inside_a_draft(engine_of, ask, tokenizer) -> None:
    engine = engine_of("alike", engine=SPECULATE)
    prompt = some(random.Random(7), 10)
    whole = ask(engine, Request(prompt, 30, 0.4, temperature=0.0))[0]
    for size in (1, 2, 3, 6):
        assert ask(engine, Request(prompt, size, 0.4, temperature=0.0))[0].ids == whole.ids[:size]
    stop = tokenizer.decode(whole.ids[5:7])

    stopped = ask(engine, Request(prompt, 30, 0.4, temperature=0.0, stop=(stop,)))[0]

    assert stopped.end.finish_reason == "stop" and stop not in stopped.text and len(stopped.ids) <= 7


@pytest.mark.soak
def test_drawn_answers_have_the_plain_frequencies(engine_of, ask) -> None:
    """Third tokens after one prompt, speculative against plain: two samples of one distribution."""
    prompt = some(random.Random(8), 8)
    counts: list[dict[int, int]] = []
    for base, options in ((0, {"max_length": 128, "slots": 2}), (1000, SPECULATE | {"slots": 2})):
        engine = engine_of("full", engine=options, dial={"plausibility": 0.1})
        found: dict[int, int] = {}
        for answer in ask(engine, *(Request(prompt, 3, 0.4, temperature=1.5, seed=base + i) for i in range(200))):
            found[answer.ids[2]] = found.get(answer.ids[2], 0) + 1
        counts.append(found)
    common = [token for token in counts[0] if counts[0][token] + counts[1].get(token, 0) >= 10]
    table = torch.tensor([[found.get(token, 0) for token in common] for found in counts]).double()
    table = torch.cat([table, 200 - table.sum(1, keepdim=True)], dim=1)

    expected = table.sum(0, keepdim=True) / 2
    statistic = float(((table - expected) ** 2 / expected.clamp(min=1)).sum())
    assert statistic < 3 * max(6, table.shape[1])  # far beyond it for another distribution
