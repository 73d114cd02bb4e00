"""Answers held to a grammar, to a deadline, and prompts that are read for their own log-probabilities."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tigerbot.errors import InputError
from tigerbot.spec import GrammarSpec
from tigerbot_serve.engine import grammar as grammars_module
from tigerbot_serve.engine.grammar import Grammars, Matcher, Unfollowed, following, json_source
from tigerbot_serve.engine.request import FinishEvent, PromptEvent, Request

PERSON = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "maxLength": 6},
        "city": {"enum": ["北京", "Paris"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 150}, "maxItems": 2},
    },
    "required": ["名字", "city", "ages"],
    "additionalProperties": False,
}


def compiled(tokenizer, schema, **limits):
    spec = GrammarSpec(**limits)
    return Grammars(tokenizer, spec).compile(json_source(following(schema, spec, strict=True)))


def prompt(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


def test_json_answers_parse_at_every_dial_and_temperature_beside_free_text(engine_of, ask, tokenizer) -> None:
    engine = engine_of("lora", engine={"max_length": 700, "slots": 8})
    grammar = compiled(tokenizer, PERSON)
    start = prompt(tokenizer, "狐狸")
    held = [
        Request(start, 600, dial, temperature=temperature, seed=seed, grammar=grammar)
        for seed, (dial, temperature) in enumerate([(0.0, 0.0), (0.0, 2.0), (0.5, 1.0), (0.7, 0.0), (1.0, 2.0)])
    ]
    free = Request(start, 30, 0.5, temperature=1.0, seed=9)

    *answers, among = ask(engine, *held, free)

    for answer in answers:
        found = json.loads(answer.text)
        assert answer.end.finish_reason == "stop"
        assert set(found) == set(PERSON["required"]) and found["city"] in ("北京", "Paris")
        assert len(found["名字"]) <= 6 and all(0 <= age <= 150 for age in found["ages"])
    assert among.ids == ask(engine, free)[0].ids
    assert ask(engine, held[2])[0].ids == answers[2].ids


def test_a_held_answer_at_the_dials_end_is_the_single_models(engine_of, ask, tokenizer) -> None:
    asked = {"logit_bias": ((98, -100.0), (99, 2.0)), "presence_penalty": 0.5, "grammar": compiled(tokenizer, PERSON)}
    fields = {"prompt_ids": prompt(tokenizer, "狐狸"), "max_tokens": 200, "temperature": 1.0, "seed": 4, **asked}
    limits = {"max_length": 300}

    alone = ask(engine_of("alone", engine=limits), Request(dial=1.0, **fields))[0]
    mixed, _ = ask(engine_of("full", engine=limits), Request(dial=1.0, **fields), Request(dial=0.3, **fields))

    assert mixed.ids == alone.ids
    for ours, theirs in zip(mixed.tokens, alone.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_log_probabilities_are_the_mixtures_own_whatever_holds_the_answer(engine_of, ask, tokenizer) -> None:
    engine = engine_of("lora")
    plain = Request(prompt(tokenizer, "The fox"), 1, 0.5, temperature=0.0, logprobs=5)
    best = ask(engine, plain)[0].tokens[0]

    banned = ask(engine, Request(plain.prompt_ids, 1, 0.5, 0.0, logprobs=5, logit_bias=((best.token_id, -100.0),)))[0]
    held = ask(engine, Request(plain.prompt_ids, 1, 0.5, 0.0, logprobs=5, grammar=compiled(tokenizer, PERSON)))[0]

    assert banned.ids[0] == best.top_logprobs[1][0]
    for answer in (banned, held):
        assert dict(answer.tokens[0].top_logprobs) == pytest.approx(dict(best.top_logprobs), abs=1e-5)
    assert held.tokens[0].text == "{" and held.tokens[0].logprob < best.logprob


def test_a_presence_penalty_stops_a_loop(engine_of, ask, tokenizer) -> None:
    engine = engine_of("lora")
    fields = {"prompt_ids": prompt(tokenizer, "The fox"), "max_tokens": 24, "dial": 0.5, "temperature": 0.0}

    looping, varied = ask(engine, Request(**fields), Request(**fields, presence_penalty=2.0, frequency_penalty=2.0))

    assert len(set(varied.ids)) > len(set(looping.ids))


def test_a_rewrite_is_held_to_the_grammar_too(engine_of, ask, tokenizer, heads) -> None:
    engine = engine_of("lora", heads=str(heads(p_dev=3.0)), judge={"margin": 0.0}, engine={"max_length": 700})
    grammar = compiled(tokenizer, PERSON)
    request = Request(prompt(tokenizer, "狐狸"), 500, 0.5, 1.0, seed=1, verify=True, max_rewrites=1, grammar=grammar)

    answer = ask(engine, request)[0]

    assert answer.end.summary.rewrites == 1
    assert set(json.loads(answer.text)) == set(PERSON["required"])


def test_a_text_with_a_tool_call_is_not_judged(engine_of, ask, tokenizer, heads) -> None:
    engine = engine_of("lora", heads=str(heads(p_dev=3.0)), engine={"max_length": 700})
    fields = {"prompt_ids": prompt(tokenizer, "狐狸"), "max_tokens": 500, "dial": 0.5, "temperature": 1.0, "seed": 1}
    held = fields | {"grammar": compiled(tokenizer, PERSON), "verify": True, "max_rewrites": 2}

    called, judged = ask(engine, Request(**held, unjudged='"city"'), Request(**held, unjudged="<tool_call>"))

    assert (called.end.summary.verdict, called.end.summary.rewrites) == ("unverified", 0)
    assert judged.end.summary.rewrites == 2


def test_a_grammar_that_grows_too_large_ends_its_own_request_only(engine_of, ask, tokenizer, monkeypatch) -> None:
    engine = engine_of("lora")
    real, calls = Matcher.allowed, []

    def runs_out(self, size):
        calls.append(1)
        if len(calls) > 3:
            raise Unfollowed("too many states")
        return real(self, size)

    monkeypatch.setattr(grammars_module.Matcher, "allowed", runs_out)
    start = prompt(tokenizer, "The fox")
    held = Request(start, 50, 0.5, 1.0, seed=1, grammar=compiled(tokenizer, PERSON), verify=True)

    broken, other = ask(engine, held, Request(start, 12, 0.5, 1.0, seed=1))

    assert (broken.end.finish_reason, broken.end.error) == ("grammar", "too many states")
    assert other.end.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objekt"}, "Invalid type"),
        ({"$ref": "http://127.0.0.1/x.json"}, "does not fetch"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"not": {"type": "string"}}, "Unimplemented"),
        ({"enum": ["x" * 70_000]}, "70,"),
    ],
)
def test_a_schema_that_cannot_be_followed_says_why(tokenizer, schema, says) -> None:
    with pytest.raises(InputError, match=says):
        compiled(tokenizer, schema)


def test_a_schema_too_deep_is_refused_and_one_not_strict_is_followed_as_far_as_it_goes(tokenizer) -> None:
    deep = {"type": "string"}
    for _ in range(12):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InputError, match="13 levels"):
        compiled(tokenizer, deep, max_depth=12)

    loose = following({"type": "string", "not": {"const": "x"}}, GrammarSpec(), strict=False)
    assert Grammars(tokenizer, GrammarSpec()).compile(json_source(loose))


def test_compiled_grammars_are_remembered_up_to_a_number(tokenizer) -> None:
    grammars = Grammars(tokenizer, GrammarSpec(cached=2))
    sources = [json_source({"type": kind}) for kind in ("string", "integer", "null")]

    first = grammars.compile(sources[0])
    assert grammars.compile(sources[0]) is first is grammars.known(sources[0])
    for source in sources[1:]:
        grammars.compile(source)

    assert grammars.known(sources[0]) is None and grammars.known(sources[2]) is not None


def test_a_deadline_ends_a_request_within_a_step_and_what_was_given_stays(engine_of, tokenizer) -> None:
    engine = engine_of("lora", engine={"slots": 1, "max_length": 900})

    async def story() -> tuple[list, list]:
        loop = asyncio.get_running_loop()
        late = engine.submit(Request(prompt(tokenizer, "The fox"), 880, 0.5, 2.0, seed=1, deadline_s=1.0), loop)
        waiting = engine.submit(Request(prompt(tokenizer, "The fox"), 880, 0.5, 2.0, seed=1, deadline_s=0.0), loop)
        return [event async for event in late], [event async for event in waiting]

    late, waiting = asyncio.run(asyncio.wait_for(story(), 60))

    assert [type(event) for event in waiting] == [FinishEvent] and waiting[0].finish_reason == "deadline"
    assert late[-1].finish_reason == "deadline" and 1 < len(late) < 880
    assert late[-1].usage.completion_tokens == len(late) - 1


def test_a_held_answer_that_is_whole_at_its_deadline_is_given_unverified(
    engine_of, tokenizer, heads, monkeypatch
) -> None:
    engine = engine_of("lora", heads=str(heads(p_dev=3.0)), engine={"prefill_chunk": 1, "max_length": 900})
    real = engine.judge.reading

    def slow(*args):
        time.sleep(1.0)  # the judge's turn begins after the deadline
        return real(*args)

    monkeypatch.setattr(engine.judge, "reading", slow)

    async def story() -> list:
        request = Request(
            prompt(tokenizer, "The fox"), 4, 0.5, 1.0, seed=1, verify=True, max_rewrites=2, deadline_s=0.9
        )
        return [event async for event in engine.submit(request, asyncio.get_running_loop())]

    events = asyncio.run(asyncio.wait_for(story(), 60))

    end = events[-1]
    if end.finish_reason != "deadline":  # on a machine so slow that four tokens take a second, nothing was whole
        assert end.finish_reason in ("stop", "length") and end.summary.verdict == "unverified"
        assert end.usage.completion_tokens > 0


@pytest.mark.parametrize("dial", [0.0, 0.6, 1.0])
def test_a_prompts_own_log_probabilities_are_those_of_the_same_tokens_as_an_answer(
    engine_of, ask, tokenizer, dial
) -> None:
    engine = engine_of("lora", engine={"prefill_chunk": 3, "max_length": 128})
    start = prompt(tokenizer, "The fox sings")
    said = ask(engine, Request(start, 6, dial, temperature=0.0, logprobs=2))[0]

    read = ask(engine, Request((*start, *said.ids), 0, dial, prompt_logprobs=2))[0]

    assert isinstance(read.events[0], PromptEvent) and read.end.finish_reason == "length"
    tokens = read.events[0].tokens
    assert [token.token_id for token in tokens] == [*start, *said.ids] and read.ids == []
    for ours, theirs in zip(tokens[len(start) :], said.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert ours.top_logprobs[0][0] == theirs.token_id
