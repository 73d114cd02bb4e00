"""What can be drawn, and how often: the sampler by itself and under a request's penalties, biases, bans and grammar."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.spec import DialSpec, GrammarSpec
from tigerbot_serve.engine.grammar import Grammars, following, json_source
from tigerbot_serve.engine.request import Request
from tigerbot_serve.engine.sampler import draw, sample, weigh
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.steer import steer
from tigerbot_serve.ensemble.dial import mix

JSON = {"type": "object", "properties": {"名字": {"type": "string"}}, "required": ["名字"]}
DIALS = st.sampled_from([0.0, 1.0, 1e-9, 0.5, 0.999])


def sequence_of(tokenizer, request: Request, output: tuple[int, ...] = ()) -> Sequence:
    sequence = Sequence(
        request,
        tokenizer,
        frozenset(),
        max_tokens=10**6,
        dial=request.dial,
        temperature=None,
        rng=random.Random(0),
    )
    for token in output:
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
    return sequence


@st.composite
def requests(draw_, size: int, grammar=None) -> tuple[Request, tuple[int, ...]]:
    """A request that asks for anything, and an answer so far."""
    tokens = st.integers(0, size - 1)
    bans = draw_(st.sampled_from(["none", "some", "all"]))
    biases = draw_(st.dictionaries(tokens, st.floats(-100, 100), max_size=5))
    banned = {"none": [], "some": draw_(st.lists(tokens, max_size=9)), "all": range(size)}[bans]
    request = Request(
        prompt_ids=(1, 2, 3),
        max_tokens=9,
        dial=draw_(DIALS),
        presence_penalty=draw_(st.floats(-2, 2)),
        frequency_penalty=draw_(st.floats(-2, 2)),
        repetition_penalty=draw_(st.sampled_from([1.0, 1e-6, 0.5, 1.3, 2.0])),
        logit_bias=tuple((biases | dict.fromkeys(banned, -100.0)).items()),
        top_k=draw_(st.sampled_from([0, 1, 5, 10**6])),
        min_p=draw_(st.sampled_from([0.0, 0.1, 1.0])),
        top_p=draw_(st.sampled_from([1e-6, 0.5, 1.0])),
        grammar=grammar if draw_(st.booleans()) else None,
    )
    return request, tuple(draw_(st.lists(tokens, max_size=20)))


@pytest.fixture(scope="module")
def grammar(tokenizer):
    spec = GrammarSpec()
    return Grammars(tokenizer, spec).compile(json_source(following(JSON, spec, strict=True)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_batch_asks_every_row_keeps_a_token_and_nothing_is_nan(tokenizer, grammar, data) -> None:
    size = len(tokenizer)
    asked = [data.draw(requests(size, grammar)) for _ in range(data.draw(st.integers(1, 4)))]
    spread = data.draw(st.sampled_from([0.01, 5.0, 300.0, 1e6]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    members = [torch.log_softmax(torch.randn(len(asked), size, generator=generator) * spread, -1) for _ in range(2)]
    mixed_RV = mix(*members, torch.tensor([request.dial for request, _ in asked]), DialSpec())
    before_RV = mixed_RV.clone()
    sequences = [sequence_of(tokenizer, request, output) for request, output in asked]

    steered_RV = steer(mixed_RV, sequences)
    temperatures = torch.tensor([data.draw(st.sampled_from([0.0, 1e-4, 1.0, 2.0])) for _ in asked])
    uniforms = torch.tensor([data.draw(st.sampled_from([0.0, 0.5, 1 - 2**-53])) for _ in asked], dtype=torch.float64)
    tops = [request.top_p for request, _ in asked]
    more = {"top_k": [request.top_k for request, _ in asked], "min_p": [request.min_p for request, _ in asked]}
    ids = sample(steered_RV, temperatures, tops, uniforms, 0.05, **more)
    weights_RV = weigh(steered_RV, temperatures, tops, 0.05, **more)

    assert torch.equal(mixed_RV, before_RV), "what log-probabilities are given of stays as it was"
    assert not steered_RV.isnan().any() and not weights_RV.isnan().any()
    for row, (token, (request, _)) in enumerate(zip(ids.tolist(), asked, strict=True)):
        assert weights_RV[row, token] > 0 or temperatures[row] == 0
        assert weights_RV[row].max() == 1, "the best token passes every mask"
        banned = {token for token, bias in request.logit_bias if bias <= -100}
        allowed = set(range(size))
        if request.grammar is not None:
            allowed = set(request.grammar.begin().allowed(size).nonzero()[0].tolist())
        assert token in (allowed - banned or allowed)


def test_penalties_count_the_answers_own_tokens_once_and_the_prompt_only_for_repetition(tokenizer) -> None:
    row = torch.log_softmax(torch.arange(10.0), -1)[None]
    asked = Request((9,), 5, 0.5, presence_penalty=0.5, frequency_penalty=0.25)
    repeated = Request((9,), 5, 0.5, repetition_penalty=2.0)

    penalised, doubled = (steer(row, [sequence_of(tokenizer, one, (3, 3, 4))])[0] - row[0] for one in (asked, repeated))

    assert penalised.tolist() == pytest.approx([0, 0, 0, -1.0, -0.75, 0, 0, 0, 0, 0], abs=1e-6)
    assert doubled[[3, 4, 9]].tolist() == pytest.approx(row[0, [3, 4, 9]].tolist()), "log-probabilities twice as low"
    assert doubled[[0, 1, 2, 5, 6, 7, 8]].abs().max() == 0


def test_nobody_asking_costs_nothing(tokenizer) -> None:
    row = torch.randn(1, 10)

    assert steer(row, [sequence_of(tokenizer, Request((1,), 5, 0.5), (3,))]) is row


def test_a_hundred_thousand_draws_follow_the_weights_of_every_mask() -> None:
    torch.manual_seed(0)
    scores_1V = torch.randn(1, 50)
    temperature, floor, top_p, top_k, min_p, draws = 1.3, 0.02, 0.9, 20, 0.05, 100_000
    shares = (scores_1V[0] - scores_1V.max()).double()
    expected = (shares / temperature).exp()
    expected[(shares < math.log(floor)) | (expected < min_p)] = 0
    expected[expected < expected.sort(descending=True).values[top_k - 1]] = 0
    order = expected.argsort(descending=True)
    before = expected[order].cumsum(0) - expected[order]
    expected[order[before >= top_p * expected.sum()]] = 0
    expected = expected / expected.sum()
    assert 5 < (expected > 0).sum() < 20, "the masks overlap without being one"

    weights_RV = weigh(scores_1V, torch.tensor([temperature]), [top_p], floor, top_k=[top_k], min_p=[min_p])
    uniform_R = torch.rand(draws, dtype=torch.float64)
    counts = draw(weights_RV.expand(draws, -1), uniform_R).bincount(minlength=50).double()

    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum().item()
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is normal; 4.5 sigma is one in 300,000.
    normal = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert normal < 4.5


def test_the_last_point_of_the_unit_draws_a_token_that_has_weight() -> None:
    weights_RV = torch.tensor([[1.0, 1e-7, 0.0, 0.0]])

    assert draw(weights_RV, torch.tensor([1.0 - 2**-53], dtype=torch.float64)).tolist() == [1]
    assert draw(weights_RV, torch.tensor([0.0], dtype=torch.float64)).tolist() == [0]
