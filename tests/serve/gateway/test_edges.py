"""What reaches the gateway before the engine does: bodies, fields, keys."""

from __future__ import annotations

import pytest

from tigerbot_serve.gateway.body import parse_object
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, parse

HELLO = {"model": "tiger", "messages": [{"role": "user", "content": "你好"}]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 40 + b"1" + b"}" * 40,
    ],
)
def test_a_body_that_is_no_bounded_json_object_is_refused_with_400(data: bytes):
    with pytest.raises(ApiError) as refused:
        parse_object(data)

    assert refused.value.status == 400
    assert refused.value.body["error"]["code"] == "invalid_json"


def test_a_pair_of_escaped_surrogates_is_the_character_it_stands_for():
    assert parse_object(b'{"a": "\\ud83d\\udc2f"}') == {"a": "\U0001f42f"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("creativity", 1.7),
        ("creativity", "0.3"),
        ("max_rewrites", 3),
        ("verify", "yes"),
        ("temperature", 2.1),
        ("n", 5),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("max_tokens", 0),
        ("top_logprobs", 21),
        ("messages", []),
    ],
)
def test_a_wrong_field_is_named_in_param(field: str, value: object):
    with pytest.raises(ApiError) as refused:
        parse(ChatBody, HELLO | {field: value})

    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == field


def test_unknown_fields_are_ignored_and_named():
    body, ignored = parse(ChatBody, HELLO | {"reasoning": 1, "zeta": {}, "creativity": 1})

    assert ignored == ["reasoning", "zeta"]
    assert body.creativity == 1.0


def test_content_parts_are_one_text_and_developer_is_system():
    parts = [{"type": "text", "text": "事实"}, {"type": "text", "text": " and ideas"}]
    body, _ = parse(ChatBody, {"model": "m", "messages": [{"role": "developer", "content": parts}]})

    assert body.messages[0].plain() == {"role": "system", "content": "事实 and ideas"}


def test_a_prompt_is_text_or_token_ids():
    assert parse(CompletionBody, {"model": "m", "prompt": [1, 2]})[0].prompt == [1, 2]
    with pytest.raises(ApiError) as refused:
        parse(CompletionBody, {"model": "m", "prompt": 3})
    assert refused.value.body["error"]["param"] == "prompt"


def test_keys_are_kept_as_digests_and_only_they_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEYS", "sk-one, sk-two,")
    ring = KeyRing.from_environment("SOME_KEYS")

    assert "sk-one" not in repr(ring)
    assert ring.check("Bearer sk-one") != ring.check("bearer sk-two")
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer sk-", "Basic sk-one", "Bearer \udcff"):
        with pytest.raises(ApiError) as refused:
            ring.check(wrong)
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_an_empty_ring_is_open():
    assert KeyRing().check(None).id == "open"
