"""The gate leaves out the second member, and with a linear mix nobody can tell from what is drawn."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tigerbot.spec import DialSpec
from tigerbot_serve.engine.certain import certain, coupled
from tigerbot_serve.engine.gate import Meter
from tigerbot_serve.engine.request import Request
from tigerbot_serve.engine.sampler import weigh
from tigerbot_serve.ensemble.dial import mix

DRAWS, WORDS = 100_000, 50


def some(chance: random.Random, size: int) -> tuple[int, ...]:
    return tuple(chance.randrange(80, 400) for _ in range(size))


def members(seed: int, sharpness: float) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.log_softmax(torch.randn(1, WORDS, generator=make) * sharpness, dim=-1) for _ in range(2)
    )


def target(own: Tensor, other: Tensor, weight: float, heat: float, floor: float) -> Tensor:
    mixed = mix(other, own, torch.tensor([weight]), DialSpec(mix="linear"))
    weights = weigh(mixed, torch.tensor([heat]), [1.0], floor).double()
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("weight", "heat", "floor", "sharpness"),
    [(0.2, 1.0, 0.0, 1.0), (0.4, 0.7, 0.05, 2.0), (0.1, 0.4, 0.1, 1.5), (0.5, 1.0, 0.05, 3.0)],
)
def test_what_the_gate_draws_is_the_plain_mixture(weight, heat, floor, sharpness) -> None:
    own, other = members(3, sharpness)
    wanted = target(own, other, weight, heat, floor)
    loose = torch.tensor([min(1.0, weight + 0.1)])  # the weight is known as a range, as with heads

    bound = certain(own, loose, torch.tensor([heat]), torch.tensor([heat]), floor)
    uniform = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = coupled(bound.expand(DRAWS, -1), wanted.expand(DRAWS, -1), uniform)

    share = float(bound.sum())
    assert 0.01 < share < 1
    counts = torch.bincount(ids, minlength=WORDS)
    kept = wanted[0] > 0
    assert int(counts[~kept].sum()) == 0
    assert chisquare(counts[kept].numpy(), (wanted[0][kept] * DRAWS).numpy()).pvalue > 1e-3


def test_the_bound_holds_for_every_weight_and_temperature_in_its_ranges() -> None:
    chance = random.Random(2)
    for seed in range(200):
        own, other = members(seed, chance.choice([0.5, 2.0, 6.0]))
        low, high = sorted(chance.random() for _ in range(2))
        cool, hot = sorted(chance.uniform(0.05, 1.0) for _ in range(2))
        floor = chance.choice([0.0, 0.05, 0.3])
        bound = certain(own, torch.tensor([high]), torch.tensor([cool]), torch.tensor([hot]), floor)
        for weight in (low, (low + high) / 2, high):
            for heat in (cool, (cool + hot) / 2, hot):
                assert bool((bound <= target(own, other, weight, heat, floor) + 1e-6).all())


def test_greedily_only_a_best_token_that_stays_best_is_certain() -> None:
    own = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(2, -1)
    still = torch.zeros(2)

    bound = certain(own, torch.tensor([0.3, 0.35]), still, still)

    assert bound.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_nothing_is_certain_above_temperature_one() -> None:
    own, _ = members(1, 2.0)

    assert float(certain(own, torch.tensor([0.1]), torch.tensor([1.0]), torch.tensor([1.2])).sum()) == 0


@pytest.mark.parametrize(
    ("kind", "together"),
    [
        ("full", True),
        ("lora", True),
        pytest.param("full", False, marks=pytest.mark.soak),
        pytest.param("lora", False, marks=pytest.mark.soak),
    ],
)
def test_greedy_answers_are_the_plain_ensembles(kind, together, engine_of, ask, heads) -> None:
    chance = random.Random(3)
    fields = {"heads": str(heads(hidden=4))} if kind == "lora" else {}
    dials = (0.05, 0.2, 0.45, 0.6, 0.8, 0.95, 0.0, 1.0)
    asked = [Request(some(chance, 9 + i), 24, dial, temperature=0.0) for i, dial in enumerate(dials)]
    linear = {"mix": "linear", "a": 0.1, "b": 0.1}
    plain = engine_of(kind, dial=linear, **fields)
    gated = engine_of(kind, dial=linear, engine={"max_length": 128, "gate": {"min_run": 2, "max_debt": 5}}, **fields)

    expected = ask(plain, *asked)
    found = ask(gated, *asked) if together else [ask(gated, request)[0] for request in asked]

    for one, other in zip(expected, found, strict=True):
        assert one.ids == other.ids
        for mine, theirs in zip(one.tokens, other.tokens, strict=True):
            if theirs.w not in (0.0, 1.0):  # both members ran: all numbers are the mixture's
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
                assert mine.w == pytest.approx(theirs.w, abs=1e-5)
        assert sum(token.gated for token in other.tokens) == (other.end.summary.gate_rate or 0) * len(other.tokens)
    rates = [answer.end.summary.gate_rate or 0.0 for answer in found]
    assert max(rates) > 0.3 and rates[-2:] == [0.0, 0.0]


def test_a_risk_is_told_only_where_the_factual_member_ran(engine_of, ask, heads) -> None:
    weights = torch.randn(257, generator=torch.Generator().manual_seed(1)) * 0.2
    fields = {"heads": str(heads(w_dev=weights)), "dial": {"mix": "linear", "a": 0.05, "b": 0.05}}
    request = Request(some(random.Random(4), 12), 40, 0.93, temperature=0.0, want_tokens=True)

    plain = ask(engine_of("lora", **fields), request)[0]
    gated = ask(engine_of("lora", engine={"gate": {"min_run": 2, "max_debt": 4}}, **fields), request)[0]

    assert gated.ids == plain.ids
    skipped = [event for event in gated.tokens if event.gated]
    assert {event.w for event in skipped} == {1.0} and not any(event.gated for event in plain.tokens)
    assert len(skipped) > 8 and all(event.p_dev is None for event in skipped)
    told = [(a, b.p_dev) for a, b in zip(gated.end.summary.tokens, plain.end.summary.tokens, strict=True)]
    assert sum(token.p_dev is not None for token, _ in told) > len(told) - 6  # paid debts were read after all
    for token, p_dev in told[:-1]:
        if token.p_dev is not None:
            assert token.p_dev == pytest.approx(p_dev, abs=1e-4)


def test_a_seed_is_a_text_whatever_else_is_decoded_beside_the_gate(engine_of, ask) -> None:
    chance = random.Random(5)
    linear = {"mix": "linear", "plausibility": 0.0}
    engine = engine_of("full", dial=linear, engine={"slots": 6, "max_length": 128, "gate": {"min_run": 1}})
    mine = Request(some(chance, 8), 24, 0.1, temperature=0.9, seed=11)
    others = [Request(some(chance, 9 + i), 10 + 3 * i, 0.2 * i, temperature=0.8, seed=i) for i in range(5)]

    alone = ask(engine, mine)[0]
    crowded = ask(engine, *others[:3], mine, *others[3:])[3]

    assert crowded.ids == alone.ids
    assert alone.end.summary.gate_rate and crowded.end.summary.gate_rate == alone.end.summary.gate_rate


@pytest.mark.soak
def test_pairs_of_tokens_have_the_plain_frequencies(engine_of, ask) -> None:
    """Pairs of tokens after one prompt, gated against plain: two samples of one distribution."""
    prompt = some(random.Random(6), 8)
    linear = {"mix": "linear", "plausibility": 0.2}
    counts = []
    for gate in (None, {"min_run": 1}):
        options = {"max_length": 128, "slots": 32} | ({"gate": gate} if gate else {})
        engine = engine_of("full", dial=linear, engine=options)
        asked = [Request(prompt, 7, 0.3, temperature=1.0, seed=1000 * bool(gate) + seed) for seed in range(250)]
        answers = ask(engine, *asked)
        found: dict[tuple[int, ...], int] = {}
        for answer in answers:
            found[tuple(answer.ids[-2:])] = found.get(tuple(answer.ids[-2:]), 0) + 1
        counts.append(found)
    plain, gated = counts
    common = [pair for pair in plain if plain[pair] + gated.get(pair, 0) >= 10]
    rest = [sum(n for pair, n in found.items() if pair not in common) for found in counts]

    table = torch.tensor(
        [[found.get(pair, 0) for pair in common] + [more] for found, more in zip(counts, rest, strict=True)]
    ).double()
    expected = table.sum(0, keepdim=True) * table.sum(1, keepdim=True) / table.sum()
    cells = expected > 0
    statistic = float(((table - expected) ** 2 / expected.clamp(min=1e-9))[cells].sum())
    assert statistic < 3 * max(6, table.shape[1])  # far beyond it for another distribution


@pytest.mark.soak
def test_a_geometric_gate_skips_after_it_has_measured_and_tells_the_error(engine_of, ask) -> None:
    engine = engine_of("alike", dial={"plausibility": 0.2}, engine={"max_length": 200, "gate": {"min_run": 1}})
    request = Request(some(random.Random(7), 8), 150, 0.1, temperature=0.3, seed=1)

    first, second = ask(engine, request)[0], ask(engine, request)[0]

    rates = [answer.end.summary.gate_rate or 0.0 for answer in (first, second)]
    assert rates[1] > rates[0] and rates[1] > 0.3
    assert engine.stats().gate_variation <= 0.02


def test_a_geometric_gate_that_may_not_err_is_the_plain_ensemble(engine_of, ask) -> None:
    request = Request(some(random.Random(8), 8), 40, 0.2, temperature=0.0)

    plain, gated = (ask(engine_of("full", engine=engine), request)[0] for engine in ({}, {"gate": {"eps": 0.0}}))

    assert gated.ids == plain.ids


def test_a_meter_believes_only_enough_and_low_enough_measurements() -> None:
    meter, where = Meter(eps=0.02), (1, 4)
    for _ in range(63):
        meter.add(where, 0.001)
    assert not meter.allows(where)

    meter.add(where, 0.001)
    assert meter.allows(where) and not meter.allows((1, 5))

    for _ in range(10):
        meter.add(where, 0.9)
    assert not meter.allows(where)


def test_two_adapters_run_as_one_batch_while_nobody_is_skipped(engine_of, ask, monkeypatch) -> None:
    linear = {"mix": "linear"}
    request = Request(some(random.Random(5), 10), 24, 0.5, temperature=1.0, seed=1)
    engine = engine_of("lora", dial=linear, engine={"gate": {}})
    fed, real = [], engine.members.forward

    def forward(caches, feeds):
        fed.append([len(feed.starts) for feed in feeds])
        return real(caches, feeds)

    monkeypatch.setattr(engine.members, "forward", forward)
    answer = ask(engine, request)[0]

    assert answer.end.summary.gate_rate is None
    assert len(fed) == len(answer.ids) and all(counts == [1, 1] for counts in fed)  # the prompt, and all tokens but one
