"""The OpenAI surface through the real `openai` client and through hostile bodies, over a real engine."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tigerbot_serve.gateway import sse
from tigerbot_serve.gateway.keys import KeyRing

HTTP = httpx.Client(timeout=30)  # one for all: a fresh one reads the system's certificates each time
ASK = [{"role": "user", "content": "狐狸在河边唱歌。The fox sings."}]


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiger", "messages": ASK, "max_tokens": 12, "seed": 7} | fields


def test_a_stream_and_a_whole_answer_are_the_same_text(serve_engine) -> None:
    api = client(serve_engine().url)
    fields = {"model": "tiger", "messages": ASK, "max_tokens": 24, "seed": 7, "extra_body": {"verify": False}}

    whole = api.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    chunks = list(api.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 24
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in logprobs.content)
    data = b"".join(bytes(one.bytes or []) for one in logprobs.content)
    assert data.decode("utf-8", "replace")[:5] == (whole.choices[0].message.content or "")[:5]


def test_n_answers_differ_and_repeat_with_their_seed(serve_engine) -> None:
    api = client(serve_engine().url)
    fields = {"model": "tiger", "messages": ASK, "max_tokens": 16, "seed": 3, "temperature": 2.0, "n": 3}

    first, second = (api.chat.completions.create(**fields) for _ in range(2))

    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1 and texts == [choice.message.content for choice in second.choices]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(serve_engine) -> None:
    api = client(serve_engine().url)
    fields = {"model": "tiger", "messages": ASK, "max_tokens": 40, "seed": 7}
    full = api.chat.completions.create(**fields).choices[0].message.content or ""
    assert len(full) > 6, "the test world's model says something"
    stop = full[4:6]

    cut = api.chat.completions.create(**fields, stop=[stop]).choices[0]

    assert cut.finish_reason == "stop" and cut.message.content == full[: full.index(stop)]


def test_plain_completions_and_models_are_there(serve_engine) -> None:
    api = client(serve_engine().url)

    said = api.completions.create(model="tiger", prompt="The fox", max_tokens=5, logprobs=1, seed=1)

    assert said.object == "text_completion" and said.choices[0].logprobs is not None
    assert [model.id for model in api.models.list()] == ["tiger"]


def test_the_ensemble_object_shows_dial_tokens_and_verdict(serve_engine, heads) -> None:
    served = serve_engine(heads=str(heads(p_div=1.0, p_dev=-3.0)))

    answer = HTTP.post(f"{served.url}/v1/chat/completions", json=body(creativity=0.4, ensemble_tokens=True)).json()

    ensemble = answer["ensemble"]
    assert ensemble["dial"] == 0.4 and ensemble["verdict"] == "ok" and ensemble["rewrites"] == 0
    assert 0.5 < ensemble["w_mean"] < 1  # low risk and room for ideas push it up from 0.4
    assert "".join(token["text"] for token in ensemble["tokens"]) == answer["choices"][0]["message"]["content"]
    assert all(0 < token["p_div"] < 1 and 0 < token["p_dev"] < 1 for token in ensemble["tokens"])


def test_a_doubtful_answer_is_rewritten_and_its_draft_counted(serve_engine, heads) -> None:
    served = serve_engine(heads=str(heads(p_dev=3.0)), judge={"margin": 0.0})

    answer = HTTP.post(f"{served.url}/v1/chat/completions", json=body(creativity=0.5, max_rewrites=2)).json()

    assert answer["ensemble"]["verdict"] == "flagged" and answer["ensemble"]["rewrites"] == 2
    details = answer["usage"]["completion_tokens_details"]
    assert details["draft_tokens"] > 0 and details["judge_tokens"] > 0


def test_a_held_stream_tells_its_phases_and_sends_no_ids(serve_engine, heads) -> None:
    served = serve_engine(heads=str(heads(p_dev=3.0)))

    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body(stream=True, verify=True)) as response:
        lines = [line for line in response.iter_lines() if line]

    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    phases = [chunk["ensemble"]["phase"] for chunk in chunks if "phase" in chunk.get("ensemble", {})]
    assert phases == ["draft", "judge", "rewrite"]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_heartbeats_are_chunks_that_the_client_ignores(serve_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.01)
    served = serve_engine()
    long = {"model": "tiger", "messages": ASK, "max_tokens": 60, "seed": 1, "stream": True}

    chunks = list(client(served.url).chat.completions.create(**long, extra_body={"verify": True}))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"creativity": 1.7}, 400, "creativity", "invalid_value"),
        ({"model": "gpt-5"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": ASK * 300}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "长" * 2000}]}, 400, "messages", "context_length_exceeded"),
        ({"max_tokens": "many"}, 400, "max_tokens", "invalid_value"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"n": 99}, 400, "n", "invalid_value"),
    ],
)
def test_a_wrong_field_is_named_in_openais_shape(serve_engine, fields, status, param, code) -> None:
    response = HTTP.post(f"{serve_engine().url}/v1/chat/completions", json=body(**fields))

    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert set(error) == {"message", "type", "param", "code"}


def test_hostile_bodies_get_their_status_and_the_server_lives(serve_engine) -> None:
    served = serve_engine()
    url = f"{served.url}/v1/chat/completions"

    assert HTTP.post(url, content=b"{not json").status_code == 400
    assert HTTP.post(url, content=b"\xff\xfe").status_code == 400
    assert HTTP.post(url, content=b"[" * 100_000).status_code == 400
    assert HTTP.post(url, content=json.dumps(body(user="x" * 10_000_000))).status_code == 413
    assert HTTP.get(url).status_code == 405 and HTTP.get(f"{served.url}/nothing").status_code == 404
    assert HTTP.get(f"{served.url}/healthz", headers={"host": "evil.example"}).status_code == 421
    accepted = HTTP.post(url, json=body(unknown_field=1, 未知=2))
    assert accepted.status_code == 200 and accepted.headers["x-ignored-fields"].startswith("unknown_field")


def test_keys_open_the_door_and_nothing_else_does(serve_engine) -> None:
    served = serve_engine(keys=KeyRing((hashlib.sha256(b"secret").digest(),)))

    for key in ("wrong", "secret2"):
        with pytest.raises(openai.AuthenticationError):
            client(served.url, key).chat.completions.create(model="tiger", messages=ASK, max_tokens=2)  # type: ignore[arg-type]
    assert HTTP.post(f"{served.url}/v1/chat/completions", json=body()).status_code == 401
    assert HTTP.get(f"{served.url}/v1/models").status_code == 401
    assert client(served.url, "secret").models.list().data
    assert HTTP.get(f"{served.url}/").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(serve_engine, stream: bool) -> None:
    served = serve_engine(engine={"max_length": 1000, "slots": 1})
    data = json.dumps(body(stream=stream, max_tokens=900, temperature=2.0, verify=False)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + data)
        until = time.monotonic() + 10
        while not served.engine.stats().slots_used:
            assert time.monotonic() < until
    steps = served.engine.stats().steps

    served.settle()

    assert served.engine.stats().steps - steps < 60  # of 900
    assert HTTP.post(f"{served.url}/v1/chat/completions", json=body()).status_code == 200


def test_a_deadline_is_a_504_that_is_not_retried(serve_engine) -> None:
    served = serve_engine(engine={"max_length": 1000}, http={"request_timeout_s": 0.3})

    late = HTTP.post(
        f"{served.url}/v1/chat/completions", json=body(max_tokens=900, temperature=2.0, verify=False), timeout=30
    )

    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"
    served.settle()


def test_a_full_queue_is_a_429_with_a_time_to_come_back(serve_engine) -> None:
    served = serve_engine(engine={"max_length": 1000, "slots": 1, "max_queue": 1})

    response = HTTP.post(f"{served.url}/v1/chat/completions", json=body(n=4, max_tokens=900), timeout=30)

    assert response.status_code == 429 and response.headers["retry-after"]
    served.settle()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "stream",
    "creativity",
    "verify",
    "logprobs",
]


def test_any_json_is_answered_or_refused_and_never_breaks(serve_engine) -> None:
    served = serve_engine(engine={"max_length": 64})

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
    def fuzz(fields: dict[str, Any]) -> None:
        text = json.dumps(body(max_tokens=2) | fields)
        response = HTTP.post(f"{served.url}/v1/chat/completions", content=text.encode("utf-8", "surrogatepass"))
        assert response.status_code in (200, 400, 413), response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    fuzz()

    served.settle()
    assert HTTP.post(f"{served.url}/v1/chat/completions", json=body()).status_code == 200
