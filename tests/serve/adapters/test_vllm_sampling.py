"""A request in vLLM's words: field by field, and as vLLM's own class takes it where that is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLMatcher, grammar_from
from llguidance.hf import from_tokenizer

from tigerbot.spec import GrammarSpec
from tigerbot_serve.adapters.vllm_library import Vllm
from tigerbot_serve.adapters.vllm_sampling import BANNED, lark_of, sampling_fields, scored
from tigerbot_serve.engine.grammar import Grammars, following, json_source
from tigerbot_serve.engine.request import Request
from tigerbot_serve.gateway.notations import HERMES
from tigerbot_serve.gateway.tools import Function, Tool, Toolbox, grammar_source

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ENDS = {2, 6}


def fields_of(temperature: float = 1.0, max_tokens: int = 9, floor: float = 0.0, **asked: Any) -> dict[str, Any]:
    request = Request(prompt_ids=(1, 2), max_tokens=9, dial=0.5, **asked)
    return sampling_fields(
        request, temperature=temperature, max_tokens=max_tokens, end_ids=ENDS, eos_id=2, vocab_size=600, floor=floor
    )


ASKED = {
    "seed": 7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.2,
    "logprobs": 3,
    "prompt_logprobs": 1,
}


def test_what_a_request_asks_has_the_same_name_there() -> None:
    fields = fields_of(**ASKED)

    assert {name: fields[name] for name in ASKED} == ASKED


def test_a_request_that_asks_for_nothing_changes_nothing() -> None:
    fields = fields_of()

    assert (fields["n"], fields["top_p"], fields["top_k"], fields["min_p"]) == (1, 1.0, 0, 0.0)
    assert fields["seed"] is fields["logit_bias"] is fields["logprobs"] is fields["structured_outputs"] is None
    assert fields["stop_token_ids"] == [2, 6] and fields["detokenize"] is False


def test_every_seed_is_one_that_vllm_takes() -> None:
    assert [fields_of(seed=seed)["seed"] for seed in (0, -1, -(2**63), 2**63)] == [0, 2**63 - 1, 0, 0]


def test_a_ban_is_below_every_score_and_a_token_of_no_row_is_left_out() -> None:
    fields = fields_of(logit_bias=((5, -100.0), (6, 3.0), (600, 1.0)))

    assert fields["logit_bias"] == {5: BANNED, 6: 3.0}


@pytest.mark.parametrize(("temperature", "min_p"), [(1.0, 0.05), (2.0, math.sqrt(0.05)), (0.5, 0.0025), (0.0, 0.0)])
def test_plausibility_is_the_same_mask_after_temperature(temperature, min_p) -> None:
    assert fields_of(temperature, floor=0.05)["min_p"] == pytest.approx(min_p)


def test_a_stricter_min_p_stands() -> None:
    assert fields_of(floor=0.05, min_p=0.3)["min_p"] == 0.3


def test_a_prompt_alone_costs_the_one_token_that_vllm_wants() -> None:
    assert fields_of(max_tokens=0, prompt_logprobs=0)["max_tokens"] == 1


def test_alternatives_are_the_likeliest_and_the_drawn_token_has_its_own_number() -> None:
    place = {9: SimpleNamespace(logprob=-3.0, rank=40), 4: SimpleNamespace(logprob=-0.1, rank=1)}
    place[5] = SimpleNamespace(logprob=-2.0, rank=2)

    assert scored(place, 9, 2) == (-3.0, ((4, -0.1), (5, -2.0)))
    assert scored(place, 9, 0) == (-3.0, ())


def test_where_nothing_was_asked_there_is_no_number() -> None:
    logprob, tops = scored(None, 9, None)

    assert math.isnan(logprob) and tops == ()


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
GO = Tool(type="function", function=Function(name="go", parameters=SCHEMA))
TOOLS = Toolbox((GO,), must=False, most=2, notation=HERMES, special={})


def sources() -> list[tuple[str, str]]:
    spec = GrammarSpec()
    calls = grammar_source(None, TOOLS, spec)
    assert calls is not None
    held = json_source(following(SCHEMA, spec, strict=True))
    return [(held, '{"a":"x"}'), (calls[0], "The fox sings."), (json_source({"type": "integer"}), "12")]


@pytest.mark.parametrize("index", range(3))
def test_a_grammar_of_the_gateways_is_followed_and_ends_with_any_end_of_a_turn(tokenizer, index) -> None:
    source, text = sources()[index]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    compiler = from_tokenizer(tokenizer)  # as vLLM makes it: with one end token

    matcher = LLMatcher(compiler, grammar_from("grammar", lark_of(source, [end])), log_level=0)

    for token in tokenizer.encode(text, add_special_tokens=False):
        assert matcher.consume_token(token), matcher.get_error()
    assert matcher.consume_token(end) and not matcher.is_error()


def test_a_grammar_holds_what_it_was_compiled_from(tokenizer) -> None:
    source = json_source(SCHEMA)

    assert Grammars(tokenizer, GrammarSpec()).compile(source).source == source
    assert json.dumps(SCHEMA) in lark_of(source, [])


@needs_vllm
def test_vllms_own_class_takes_every_field_as_it_is(tokenizer) -> None:
    grammar = Grammars(tokenizer, GrammarSpec()).compile(json_source(SCHEMA))
    fields = fields_of(0.7, logit_bias=((5, -100.0),), grammar=grammar, **ASKED)

    params = Vllm().params(fields)

    assert {name: getattr(params, name) for name in fields if name != "structured_outputs"} == {
        name: value for name, value in fields.items() if name != "structured_outputs"
    }
    assert params.structured_outputs.grammar == lark_of(grammar.source, [6])
    assert params.output_kind.name == "DELTA"


@needs_vllm
def test_vllms_engine_has_every_argument_that_is_given() -> None:
    from dataclasses import fields as fields_in

    from test_vllm_checks import SMALL, spec_of
    from vllm import AsyncEngineArgs

    from tigerbot_serve.adapters.vllm_settings import engine_args

    assert set(engine_args(spec_of(), SMALL, 64)) <= {one.name for one in fields_in(AsyncEngineArgs)}
