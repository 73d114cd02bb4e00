"""At its ends the dial is the single models, whatever else is decoded beside them."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tigerbot.models import load_model
from tigerbot_serve.engine.request import Request

DIALS = [0.0, 1.0, 0.3, 0.0, 0.9, 1.0]


@pytest.fixture(scope="module")
def experts(world):
    return {0.0: load_model(world.factual).eval(), 1.0: load_model(world.creative).eval()}


def prompts(tokenizer) -> list[tuple[int, ...]]:
    texts = ["狐狸在河", "The fox", "Rain falls on the", "月亮", "old town 唱歌", "in the river at night"]
    return [tuple(tokenizer.encode(text)) for text in texts]


def alone(expert: PeftModel, prompt: tuple[int, ...], new: int) -> tuple[list[int], list[float]]:
    """transformers' own greedy decoding, and the log-probability of every token."""
    out = expert.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=[2, 6],
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = out.sequences[0, len(prompt) :].tolist()
    logprobs = [torch.log_softmax(step[0], -1)[token].item() for step, token in zip(out.logits, ids, strict=True)]
    return ids, logprobs


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("mix", ["geometric", "linear"])
@pytest.mark.parametrize("together", [False, True])
def test_dial_ends_are_the_single_experts(kind, mix, together, engine_of, heads, ask, tokenizer, experts) -> None:
    fields = {"heads": str(heads(hidden=4))} if kind == "lora" else {}
    engine = engine_of(kind, dial={"mix": mix, "plausibility": 0.1}, **fields)
    asked = [
        Request(prompt, max_tokens=20, dial=dial, temperature=0.0)
        for prompt, dial in zip(prompts(tokenizer), DIALS, strict=True)
    ]

    answers = ask(engine, *asked) if together else [ask(engine, request)[0] for request in asked]

    for request, answer in zip(asked, answers, strict=True):
        if request.dial in experts:
            ids, logprobs = alone(experts[request.dial], request.prompt_ids, 20)
            assert answer.ids == ids
            assert [token.logprob for token in answer.tokens] == pytest.approx(logprobs, abs=1e-5)
            assert {token.w for token in answer.tokens} == {request.dial}


def test_one_model_alone_answers_at_every_dial(engine_of, ask, tokenizer, experts) -> None:
    engine = engine_of("alone")
    prompt = prompts(tokenizer)[0]

    answers = ask(engine, *(Request(prompt, max_tokens=12, dial=dial, temperature=0.0) for dial in (0.0, 0.4, 1.0)))

    ids, _ = alone(experts[1.0], prompt, 12)
    assert [answer.ids for answer in answers] == [ids] * 3
