"""A real vLLM behind the gateway, asked through the official `openai` client; it runs where vLLM is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.adapters.vllm_engine import VllmEngine
from tigerbot_serve.engine.request import Request
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.scale.warm import warm

pytestmark = [
    pytest.mark.soak,  # three processes that each import torch and vLLM
    pytest.mark.timeout(1500),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ASK = [{"role": "user", "content": "The fox sings in the river at night."}]


def spec_of(world: Any, vllm: dict[str, Any] | None = None) -> ServeSpec:
    engine = {"max_length": 800, "slots": 4, "vllm": vllm}
    raw = {"kind": "serve", "name": "s", "members": {"creative": str(world.creative_full)}, "engine": engine}
    spec = parse_spec(raw | {"scale": {"threads": 1}})
    assert isinstance(spec, ServeSpec)
    return spec


@pytest.fixture(scope="module")
def engine(world) -> Iterator[VllmEngine]:
    engine = VllmEngine(spec_of(world, {"compiled": False}))
    engine.start()
    warm(engine)  # type: ignore[arg-type]
    yield engine
    engine.stop(timeout_s=60)


@pytest.fixture(scope="module")
def api(world, engine) -> Iterator[openai.OpenAI]:
    with TestClient(create_app(engine, spec_of(world), KeyRing()), base_url="http://127.0.0.1") as http:
        yield openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, http_client=http)


def chat(api: openai.OpenAI, **fields: Any) -> Any:
    return api.chat.completions.create(**({"model": "tiger", "messages": ASK, "seed": 7, "max_tokens": 24} | fields))


def test_greedy_tokens_and_log_probabilities_are_our_own_engines(engine, ask, world) -> None:
    request = Request(prompt_ids=(70, 90, 110), max_tokens=12, dial=1.0, temperature=0.0, logprobs=3, prompt_logprobs=1)
    ours = build_engine(spec_of(world))
    ours.start()

    (theirs,), (own,) = ask(engine, request), ask(ours, request)

    ours.stop(timeout_s=30)
    assert theirs.ids == own.ids and theirs.text == own.text
    assert [token.logprob for token in theirs.tokens] == pytest.approx(
        [token.logprob for token in own.tokens], abs=1e-3
    )
    assert [token.top_logprobs[0][0] for token in theirs.tokens] == [token.top_logprobs[0][0] for token in own.tokens]
    prompts = [[token.logprob for token in answer.events[0].tokens[1:]] for answer in (theirs, own)]
    assert prompts[0] == pytest.approx(prompts[1], abs=1e-3)


def test_a_seed_is_a_text_and_n_answers_have_seeds_of_their_own(api) -> None:
    both = chat(api, n=2, temperature=1.0)

    again = [chat(api, seed=seed, temperature=1.0).choices[0].message.content for seed in (7, 8)]

    assert [choice.message.content for choice in both.choices] == again


def test_a_stream_says_what_the_whole_answer_says_and_counts_its_tokens(api) -> None:
    whole = chat(api)

    pieces = list(chat(api, stream=True, stream_options={"include_usage": True}))

    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == (
        whole.choices[0].message.content
    )
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_text_ends_the_answer_before_itself(api) -> None:
    text = chat(api, temperature=0).choices[0].message.content
    stop = text[5:9]

    stopped = chat(api, temperature=0, stop=[stop])

    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_bias_forces_and_bans(api, tokenizer) -> None:
    (fox,) = tokenizer.encode(" fox", add_special_tokens=False)[:1]

    forced = chat(api, logit_bias={str(fox): 100}, max_tokens=3, logprobs=True, temperature=0)
    banned = chat(api, logit_bias={str(fox): -100}, temperature=1.5, logprobs=True)

    name = forced.choices[0].logprobs.content[0].token
    assert {token.token for token in forced.choices[0].logprobs.content} == {name}
    assert name not in {token.token for token in banned.choices[0].logprobs.content}


def test_long_prompts_with_seeds_are_read_beside_each_other(engine, ask) -> None:
    requests = [Request(prompt_ids=(70 + index,) * 700, max_tokens=9, dial=1.0, seed=index) for index in range(6)]

    together, alone = ask(engine, *requests), [ask(engine, request)[0] for request in requests[:2]]

    assert [answer.ids for answer in together[:2]] == [answer.ids for answer in alone]
    assert all(len(answer.ids) == 9 for answer in together) and engine.alive


@pytest.mark.parametrize("seed", [1])
def test_a_schema_is_followed(api, seed) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [1, 2]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}

    answer = chat(api, response_format=form, seed=seed, temperature=1.2, max_tokens=120)

    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "age"} and found["age"] in (1, 2) and len(found["name"]) <= 5
    assert answer.choices[0].finish_reason == "stop"


def test_a_tool_that_must_be_called_is_called(api) -> None:
    parameters = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": parameters | {"additionalProperties": False}},
    }

    answer = chat(api, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=120)

    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["days"] in (1, 2)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_prompt_is_scored_without_an_answer(api) -> None:
    scored = api.completions.create(model="tiger", prompt="The fox sings.", echo=True, logprobs=1, max_tokens=0)

    assert scored.choices[0].text == "The fox sings." and scored.usage.completion_tokens == 0
    numbers = scored.choices[0].logprobs.token_logprobs
    assert len(numbers) == len(scored.choices[0].logprobs.tokens) and all(number < 0 for number in numbers)


def test_a_caller_that_leaves_frees_its_place_and_a_deadline_ends_an_answer(engine) -> None:
    async def both() -> tuple[str, str]:
        loop = asyncio.get_running_loop()
        handle = engine.submit(Request(prompt_ids=(70,), max_tokens=250, dial=1.0, seed=1), loop)
        await anext(handle)
        handle.cancel()
        late = engine.submit(Request(prompt_ids=(70,), max_tokens=250, dial=1.0, seed=1, deadline_s=0.001), loop)
        return ([event async for event in handle][-1].finish_reason, [event async for event in late][-1].finish_reason)

    assert asyncio.run(asyncio.wait_for(both(), 120)) == ("cancelled", "deadline")
    assert engine.stats().slots_used == 0 and engine.alive
