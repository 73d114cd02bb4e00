"""The adapter behind the gateway, with a stand-in for vLLM: texts, ends, cancellation, deadlines, faults."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient
from vllm_stand_in import StandIn, Wrong

from tigerbot.errors import InputError, ServeError
from tigerbot.spec import GrammarSpec, ServeSpec, parse_spec
from tigerbot_serve.adapters.vllm_engine import VllmEngine
from tigerbot_serve.engine.grammar import Grammars, json_source
from tigerbot_serve.engine.request import PromptEvent, Request
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.scale.warm import warm

TEXT = "The fox sings in the river at night."
PROMPT = (70, 71, 72)


def request_of(**fields: Any) -> Request:
    return Request(**({"prompt_ids": PROMPT, "max_tokens": 40, "dial": 0.5, "seed": 1} | fields))


def spec_of(world: Any, **engine: Any) -> ServeSpec:
    raw = {"kind": "serve", "name": "s", "members": {"creative": str(world.base)}}
    spec = parse_spec(raw | {"engine": {"max_length": 200, "slots": 2, "max_queue": 1, "vllm": {}} | engine})
    assert isinstance(spec, ServeSpec)
    return spec


@pytest.fixture
def says(tokenizer: Any) -> list[int]:
    return [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|end|>"), 80, 81]


@pytest.fixture
def engine_over(world: Any) -> Iterator[Callable[..., VllmEngine]]:
    engines: list[VllmEngine] = []

    def make(library: StandIn, **engine: Any) -> VllmEngine:
        engines.append(VllmEngine(spec_of(world, **engine), library))  # type: ignore[arg-type]
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop(timeout_s=10)


@pytest.mark.parametrize("together", [1, 3, 100])
def test_an_answer_ends_with_its_turn_however_its_tokens_come(engine_over, ask, says, together) -> None:
    library = StandIn(says, together)
    engine = engine_over(library)

    (answer,) = ask(engine, request_of())

    assert answer.text == TEXT and answer.end.finish_reason == "stop"
    assert answer.ids == says[:-2] and answer.end.usage.completion_tokens == len(says) - 2
    assert (answer.end.usage.prompt_tokens, answer.end.usage.cached_tokens) == (3, 1)
    assert (answer.end.summary.w_mean, answer.end.summary.verdict) == (0.5, "unverified")
    assert engine.stats().outstanding_tokens == engine.stats().slots_used == 0


def test_a_stop_text_across_tokens_ends_it_and_its_request_in_vllm(engine_over, ask, says) -> None:
    library = StandIn(says)

    (answer,) = ask(engine_over(library), request_of(stop=("gs in t",)))

    assert answer.text == "The fox sin" and answer.end.finish_reason == "stop"
    assert library.left == ["tiger-0"]


def test_a_limit_is_the_requests_or_what_fits(engine_over, ask, says) -> None:
    engine = engine_over(StandIn(says * 20), max_length=8)

    first, second = ask(engine, request_of(max_tokens=2), request_of(max_tokens=40, logit_bias=((5, 1.0),)))

    assert [len(first.ids), first.end.finish_reason] == [2, "length"]
    assert [len(second.ids), second.end.finish_reason] == [5, "length"]


def test_without_a_temperature_the_dial_sets_one(engine_over, ask, says) -> None:
    library = StandIn(says)

    ask(engine_over(library), request_of(dial=0.0), request_of(dial=1.0), request_of(temperature=0.4))

    assert sorted(fields["temperature"] for _, fields in library.asked) == [0.3, 0.4, 1.0]


def test_one_tenants_prompt_is_salted_with_its_name(engine_over, ask, says) -> None:
    library = StandIn(says)

    ask(engine_over(library), request_of(tenant="ann"))

    assert library.asked[0][0] == (PROMPT, "ann")


def test_a_held_answer_is_given_whole_and_unverified(engine_over, ask, says) -> None:
    (answer,) = ask(engine_over(StandIn(says)), request_of(verify=True, want_tokens=True))

    assert [type(event).__name__ for event in answer.events[:2]] == ["PhaseEvent", "TokenEvent"]
    assert answer.text == TEXT and answer.end.summary.verdict == "unverified"


def test_numbers_are_given_where_they_are_asked_for(engine_over, ask, says) -> None:
    engine = engine_over(StandIn(says, together=2))

    plain, scored = ask(engine, request_of(), request_of(logprobs=2, prompt_logprobs=1))

    assert all(math.isnan(token.logprob) and not token.top_logprobs for token in plain.tokens)
    assert scored.tokens[0].logprob == pytest.approx(math.log(0.1))
    assert scored.tokens[0].top_logprobs == ((70, math.log(0.5)), (71, math.log(0.25)))
    (prompt,) = [event for event in scored.events if isinstance(event, PromptEvent)]
    assert [token.token_id for token in prompt.tokens] == list(PROMPT)
    assert math.isnan(prompt.tokens[0].logprob) and prompt.tokens[1].logprob == pytest.approx(math.log(0.1))


def test_a_prompt_alone_is_scored_without_an_answer(engine_over, ask, says) -> None:
    (answer,) = ask(engine_over(StandIn(says)), request_of(max_tokens=0, prompt_logprobs=0))

    assert isinstance(answer.events[0], PromptEvent) and not answer.tokens
    assert (answer.end.finish_reason, answer.end.usage.completion_tokens) == ("length", 0)


def test_a_whole_grammar_ends_the_answer(engine_over, ask, tokenizer, says) -> None:
    source = json_source({"enum": ["fox"]})
    grammar = Grammars(tokenizer, GrammarSpec()).compile(source)
    library = StandIn([*tokenizer.encode('"fox"', add_special_tokens=False), *says])

    (answer,) = ask(engine_over(library), request_of(grammar=grammar))

    assert json.loads(answer.text) == "fox" and answer.end.finish_reason == "stop"
    assert library.left == ["tiger-0"] and "%json" in library.asked[0][1]["structured_outputs"]


def test_a_grammar_that_vllm_refuses_is_the_requests_fault(engine_over, ask, tokenizer) -> None:
    library = StandIn()
    engine, grammar = engine_over(library), Grammars(tokenizer, GrammarSpec()).compile(json_source({}))
    library.error = Wrong("too deep")

    (answer,) = ask(engine, request_of(grammar=grammar))

    assert (answer.end.finish_reason, answer.end.error) == ("grammar", "too deep")


def test_a_caller_that_leaves_ends_its_request_in_vllm(engine_over, says) -> None:
    library = StandIn(says, hold=2)
    engine = engine_over(library)

    async def leave() -> list[Any]:
        handle = engine.submit(request_of(), asyncio.get_running_loop())
        begun = [await anext(handle), await anext(handle)]
        handle.cancel()
        handle.cancel()
        return begun + [event async for event in handle]

    events = asyncio.run(asyncio.wait_for(leave(), 30))

    assert events[-1].finish_reason == "cancelled" and events[-1].usage.completion_tokens == 2
    assert library.left == ["tiger-0"] and engine.stats().slots_used == 0


def test_one_that_leaves_at_once_is_told_so_too(engine_over, says) -> None:
    engine = engine_over(StandIn(says, hold=0))

    async def leave() -> list[Any]:
        handles = [engine.submit(request_of(), asyncio.get_running_loop()) for _ in range(3)]
        for handle in handles:
            handle.cancel()
        return [[event async for event in handle][-1].finish_reason for handle in handles]

    assert asyncio.run(asyncio.wait_for(leave(), 30)) == ["cancelled"] * 3
    assert engine.stats().slots_used == engine.stats().queued == 0


def test_a_deadline_ends_what_hangs(engine_over, ask, says) -> None:
    library = StandIn(says, hold=2)

    (answer,) = ask(engine_over(library), request_of(deadline_s=0.05))

    assert answer.end.finish_reason == "deadline" and library.left == ["tiger-0"]


def test_no_more_wait_than_may(engine_over, says) -> None:
    engine = engine_over(StandIn(says, hold=0))

    async def crowd() -> None:
        loop = asyncio.get_running_loop()
        handles = [engine.submit(request_of(), loop) for _ in range(3)]  # two slots, one waits
        try:
            assert (engine.stats().slots_used, engine.stats().queued) == (2, 1)
            assert engine.stats().outstanding_tokens == 3 * (len(PROMPT) + 40)
            with pytest.raises(QueueFull, match="1 requests wait already"):
                engine.submit(request_of(), loop)
        finally:
            for handle in handles:
                handle.cancel()

    asyncio.run(asyncio.wait_for(crowd(), 30))


def test_what_does_not_fit_is_refused(engine_over) -> None:
    engine, loop = engine_over(StandIn()), asyncio.new_event_loop()

    with pytest.raises(InputError, match="the prompt has 200 tokens"):
        engine.submit(request_of(prompt_ids=(70,) * 200), loop)
    with pytest.raises(InputError, match="token ids go from 0"):
        engine.submit(request_of(prompt_ids=(10**6,)), loop)
    loop.close()


def test_a_request_that_vllm_fails_is_an_error_and_the_next_is_answered(engine_over, ask, says) -> None:
    library = StandIn(says)
    engine = engine_over(library)

    library.error = OSError("no memory\nat all")
    (failed,) = ask(engine, request_of())
    library.error = None
    (answer,) = ask(engine, request_of())

    assert (failed.end.finish_reason, failed.end.error) == ("error", "OSError: no memory")
    assert answer.text == TEXT and engine.alive


def test_an_end_that_nobody_asked_for_is_an_error(engine_over, ask, says) -> None:
    (answer,) = ask(engine_over(StandIn(says[:3])), request_of())

    assert answer.end.finish_reason == "error" and "vLLM ended the answer" in answer.end.error


def test_when_vllm_dies_the_replica_is_not_alive(engine_over) -> None:
    library = StandIn()
    engine = engine_over(library)
    assert engine.alive

    library.errored = True

    assert not engine.alive
    with pytest.raises(ServeError, match="is not running"):
        engine.submit(request_of(), asyncio.new_event_loop())


def test_a_vllm_that_does_not_start_is_one_line(world) -> None:
    engine = VllmEngine(spec_of(world), StandIn(error=RuntimeError("no such device\ntrace")))  # type: ignore[arg-type]

    with pytest.raises(ServeError, match=r"engine\.vllm: vLLM does not start \(no such device\)"):
        engine.start()


def test_a_stop_ends_what_runs_and_vllm(engine_over, says) -> None:
    library = StandIn(says, hold=1)
    engine = engine_over(library)

    async def stopped() -> Any:
        handle = engine.submit(request_of(), asyncio.get_running_loop())
        await anext(handle)
        await asyncio.to_thread(engine.stop, 10)
        return [event async for event in handle][-1]

    end = asyncio.run(asyncio.wait_for(stopped(), 30))

    assert (end.finish_reason, end.error) == ("error", "the engine stopped")
    assert library.errored and not engine.alive


def test_the_openai_client_works_unchanged(world, engine_over, tokenizer, says) -> None:
    engine = engine_over(StandIn(says), slots=4)
    warm(engine)  # type: ignore[arg-type]
    app = create_app(engine, spec_of(world, slots=4), KeyRing())
    with TestClient(app, base_url="http://127.0.0.1") as http:
        api = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, http_client=http)
        asked: dict[str, Any] = {"model": "tiger", "messages": [{"role": "user", "content": "hi"}]}

        whole = api.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=1, stop=[" at"])
        pieces = list(api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
            api.embeddings.create(model="tiger", input="hi")

    assert [choice.message.content for choice in whole.choices] == [TEXT[:26]] * 2
    assert whole.choices[0].logprobs.content[0].top_logprobs
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == TEXT
    assert pieces[-1].usage.completion_tokens == len(says) - 2
