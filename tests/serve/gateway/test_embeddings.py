"""`/v1/embeddings` through the official client, against the base's own hidden states."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import torch

from tigerbot.chat import encode_plain
from tigerbot.models import load_model
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import Request

TEXTS = ["狐狸在河边唱歌。", "Rain falls on the old town.", "The fox"]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@torch.inference_mode()
def expected(base: Any, tokenizer: Any, text: str) -> torch.Tensor:
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([[*begin, *encode_plain(tokenizer, text)]])
    mean = base.model(input_ids=ids).last_hidden_state[0].mean(dim=0)
    return mean / mean.norm()


def test_vectors_are_the_bases_mean_hidden_states_whichever_way_they_are_asked_for(serve_engine, world, tokenizer):
    api = client(serve_engine().url)
    base = load_model(world.base).eval()

    default = api.embeddings.create(model="tiger", input=TEXTS)  # the client asks for base64 and decodes it
    numbers = api.embeddings.create(model="tiger", input=TEXTS, encoding_format="float")
    alone = api.embeddings.create(model="tiger", input=TEXTS[1])

    for index, text in enumerate(TEXTS):
        found = default.data[index]
        assert found.index == index and math.hypot(*found.embedding) == pytest.approx(1, abs=1e-5)
        assert found.embedding == pytest.approx(numbers.data[index].embedding, abs=1e-6)
        assert found.embedding == pytest.approx(expected(base, tokenizer, text).tolist(), abs=1e-5)
    assert alone.data[0].embedding == pytest.approx(default.data[1].embedding, abs=1e-5)
    assert default.model == "tiger" and default.usage.prompt_tokens == default.usage.total_tokens > 0


def test_token_ids_are_taken_as_they_are(serve_engine, tokenizer):
    api = client(serve_engine().url)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [[*begin, *encode_plain(tokenizer, text)] for text in TEXTS]

    texts = api.embeddings.create(model="tiger", input=TEXTS)
    tokens = api.embeddings.create(model="tiger", input=ids)
    one = api.embeddings.create(model="tiger", input=ids[0])

    assert [row.embedding for row in tokens.data] == [row.embedding for row in texts.data]
    assert len(one.data) == 1 and one.usage.prompt_tokens == len(ids[0])


def test_fewer_dimensions_are_the_first_ones_made_length_one_again(serve_engine):
    api = client(serve_engine().url)

    full = api.embeddings.create(model="tiger", input="The fox").data[0].embedding
    short = api.embeddings.create(model="tiger", input="The fox", dimensions=16).data[0].embedding

    scale = math.hypot(*full[:16])
    assert short == pytest.approx([value / scale for value in full[:16]], abs=1e-5)


def test_a_text_longer_than_a_piece_has_the_same_vector(serve_engine, world, tokenizer):
    api = client(serve_engine(engine={"max_length": 128, "prefill_chunk": 8}).url)
    text = "The fox sings in the river at night. 细雨落下，月亮等待。" * 2

    found = api.embeddings.create(model="tiger", input=[text, *TEXTS]).data

    base = load_model(world.base).eval()
    for row, asked in zip(found, [text, *TEXTS], strict=True):
        assert row.embedding == pytest.approx(expected(base, tokenizer, asked).tolist(), abs=1e-5)


def test_answers_are_the_same_with_embeddings_between_their_steps(engine_of, ask, tokenizer):
    engine: Engine = engine_of("lora")
    request = Request(tuple(encode_plain(tokenizer, "狐狸在河边")), 40, 0.5, temperature=0.0)
    quiet = ask(engine, request)[0].ids
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            engine.embed([(5, 6, 7)] * 3).result(timeout=30)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        assert ask(engine, request)[0].ids == quiet
    finally:
        over.set()
        disturber.join(timeout=30)


@pytest.mark.parametrize("kind", ["full", "alone"])
def test_without_a_common_base_the_factual_or_only_model_reads(
    engine_of: Callable[..., Engine], world, tokenizer, kind: str
):
    engine = engine_of(kind)
    base = load_model(world.factual_full).eval() if kind == "full" else None

    vectors = engine.embed([tuple(encode_plain(tokenizer, "The fox"))]).result(timeout=30)

    assert vectors.shape == (1, 256) and vectors.norm().item() == pytest.approx(1, abs=1e-5)
    if base is not None and tokenizer.bos_token_id is None:
        assert vectors[0].tolist() == pytest.approx(expected(base, tokenizer, "The fox").tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": ["a", ""]}, 400, "input", "invalid_value"),
        ({"input": [[]]}, 400, "input", "invalid_value"),
        ({"input": [1, "a"]}, 400, "input", "invalid_value"),
        ({"input": [[-1]]}, 400, "input", "invalid_value"),
        ({"input": [10**9]}, 400, "input", "invalid_value"),
        ({"input": None}, 400, "input", "invalid_value"),
        ({"input": ["a"] * 9}, 400, "input", "invalid_value"),
        ({"input": [[1] * 60] * 8}, 400, "input", "invalid_value"),
        ({"input": "长" * 500}, 400, "input", "context_length_exceeded"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, 400, "dimensions", "invalid_value"),
        ({"dimensions": 9999}, 400, "dimensions", "invalid_value"),
        ({"model": "other"}, 404, "model", "model_not_found"),
    ],
)
def test_what_does_not_fit_is_named(serve_engine, fields, status, param, code):
    served = serve_engine(embedding={"max_inputs": 8, "max_tokens": 400})

    response = httpx.post(f"{served.url}/v1/embeddings", json={"model": "tiger", "input": "x"} | fields, timeout=60)

    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error


def test_an_engine_that_stops_ends_what_waits(engine_of):
    engine: Engine = engine_of("lora")
    waiting = [engine.embed([(1, 2, 3)] * 200) for _ in range(5)]

    engine.stop()

    for one in waiting:
        one.exception(timeout=30)  # done, with vectors or with an error
    assert waiting[-1].done()
