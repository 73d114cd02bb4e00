"""Heads, judge and rewrite: what is read at every token, and what is done about it."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tigerbot.errors import ModelError
from tigerbot.spec import DialSpec
from tigerbot_serve.engine.request import PhaseEvent, Request
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.ensemble.dial import creative_weight, mix
from tigerbot_serve.ensemble.judge import score

SPEC = DialSpec()


def asked(tokenizer, dial: float = 0.5, **fields) -> Request:
    wanted = {"temperature": 0.0, "verify": True, "max_rewrites": 1, "want_tokens": True}
    wanted |= {"prompt_ids": tuple(tokenizer.encode("The fox 狐狸")), "max_tokens": 12, "dial": dial}
    return Request(**(wanted | fields))


def phases(answer) -> list[str]:
    return [event.phase for event in answer.events if isinstance(event, PhaseEvent)]


def test_a_good_answer_is_ok_and_given_after_it_was_judged(engine_of, heads, ask, tokenizer) -> None:
    answer = ask(engine_of("lora", heads=str(heads(p_dev=-4.0))), asked(tokenizer))[0]

    assert phases(answer) == ["draft", "judge"]
    assert answer.end.summary.verdict == "ok" and answer.end.summary.draft is None
    assert answer.end.usage.judge_tokens == len(asked(tokenizer).prompt_ids) + 12
    assert [type(event).__name__ for event in answer.events][:2] == ["PhaseEvent", "PhaseEvent"]


def test_a_rewrite_that_is_better_is_kept_and_its_draft_shown(engine_of, heads, ask, tokenizer) -> None:
    plain = engine_of("lora")
    texts = ("in the river", "The fox 狐狸", "Rain falls on", "细雨落下，月亮", "old town night", "sings", "等待")
    # A head that prefers the rewrite is hard to make by hand: of a few random ones, one happens to. The first is known
    # to; the others are for the day when the weights come out differently.
    for text, seed in itertools.product(texts, (1, 0, *range(2, 10))):
        request = asked(tokenizer, 0.69, prompt_ids=tuple(tokenizer.encode(text)))
        draft, factual = ask(plain, replace(request, verify=False), replace(request, verify=False, dial=0.0))
        if draft.ids == factual.ids:
            continue
        w_dev = torch.randn(257, generator=torch.Generator().manual_seed(seed)) * 0.3
        folder = str(heads(w_dev=w_dev))
        engine = engine_of("lora", heads=folder, judge={"threshold": 0.01, "margin": 0.01}, dial={"b": 0.0, "a": 0.0})
        answer = ask(engine, request)[0]
        engine.stop()
        if answer.end.summary.draft is not None:
            break

    summary = answer.end.summary
    assert phases(answer) == ["draft", "judge", "rewrite"] and summary.rewrites == 1
    assert answer.ids == factual.ids and [token.token_id for token in summary.draft_tokens] == draft.ids
    assert answer.end.usage.draft_tokens == len(draft.ids)


def test_a_rewrite_that_is_no_better_is_dropped_and_counted(engine_of, heads, ask, tokenizer) -> None:
    answer = ask(engine_of("lora", heads=str(heads(p_dev=4.0))), asked(tokenizer))[0]

    assert answer.end.summary.verdict == "flagged" and answer.end.summary.rewrites == 1
    assert answer.end.usage.draft_tokens == 12


@pytest.mark.parametrize("dial", [0.9, 1.0])
def test_creative_work_is_not_judged(engine_of, heads, ask, tokenizer, dial: float) -> None:
    answer = ask(engine_of("lora", heads=str(heads(p_dev=4.0))), asked(tokenizer, dial=dial))[0]

    assert answer.end.summary.verdict == "unverified" and phases(answer) == ["draft"]


def test_every_token_carries_both_probabilities(engine_of, heads, ask, tokenizer) -> None:
    answer = ask(engine_of("lora", heads=str(heads(p_div=0.5, p_dev=-1.0))), asked(tokenizer))[0]

    for token in answer.end.summary.tokens:
        assert token.p_div == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item(), abs=1e-5)
        assert token.p_dev == pytest.approx(torch.sigmoid(torch.tensor(-1.0)).item(), abs=1e-5)


def test_the_judge_reads_what_was_read_while_decoding(engine_of, heads, ask, tokenizer) -> None:
    w_dev = torch.randn(257, generator=torch.Generator().manual_seed(1)) * 0.1
    w_dev[256] = 0.7  # the lingering surprise
    engine = engine_of("lora", heads=str(heads(w_dev=w_dev)), engine={"prefill_chunk": 5, "max_length": 128})
    request = asked(tokenizer, temperature=2.0, seed=3, max_rewrites=0)

    decoded, judged = ask(engine, replace(request, verify=False), request)

    assert decoded.ids == judged.ids
    pairs = zip(decoded.end.summary.tokens[:-1], judged.end.summary.tokens, strict=False)
    for while_decoding, by_judge in pairs:
        assert while_decoding.p_dev == pytest.approx(by_judge.p_dev, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"creative_hash": "other"}, "heads of another model: creative_hash is other"),
        ({"tokenizer_hash": "other"}, "tokenizer_hash is other"),
        ({"format_version": 3}, "format_version is 3"),
        ({"layer": 3}, "heads read layer 3"),
    ],
)
def test_heads_that_do_not_belong_here_are_refused(world, heads, spec_of_members, change, message) -> None:
    with pytest.raises(ModelError, match=message):
        build_engine(spec_of_members(world.members("lora"), heads=str(heads(**change))))


def test_members_with_other_tokenizers_are_refused(world, spec_of_members, tmp_path) -> None:
    other = shutil.copytree(world.factual_full, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")

    with pytest.raises(ModelError, match="tokenizers differ"):
        build_engine(spec_of_members({"creative": str(world.creative_full), "factual": str(other)}))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.integers(2, 5))
def test_saying_the_same_thing_again_is_no_more_doubtful(p_devs: list[float], times: int) -> None:
    assert score(p_devs * times) <= score(p_devs) + 1e-9 and 0 <= score(p_devs) <= 1


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_room_for_ideas_raises_the_weight_and_risk_lowers_it(dial: float, p_div: float, p_dev: float) -> None:
    def weight(div: float, dev: float) -> float:
        return float(creative_weight(*(torch.tensor([v]) for v in (dial, div, dev)), SPEC))  # type: ignore[arg-type]

    assert weight(min(1.0, p_div + 0.1), p_dev) >= weight(p_div, p_dev) >= weight(p_div, min(1.0, p_dev + 0.1))
    for end in (0.0, 1.0):
        assert float(creative_weight(torch.tensor([end]), torch.tensor([p_div]), torch.tensor([p_dev]), SPEC)) == end


@pytest.mark.parametrize("kind", ["geometric", "linear"])
@given(seed=st.integers(0, 1000), w=st.floats(0, 1))
def test_a_mixture_is_a_distribution(kind: str, seed: int, w: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.log_softmax(3 * torch.randn(1, 50, generator=generator), -1) for _ in range(2))

    mixed = mix(a, b, torch.tensor([w]), DialSpec(mix=kind))  # type: ignore[arg-type]

    assert mixed.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
