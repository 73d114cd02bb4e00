"""Plug-ins over HTTP: asked for by name, refused by name, and what they found in the answer."""

from __future__ import annotations

import json

import httpx
import pytest


@pytest.fixture
def served(serve_engine, heads, tmp_path):
    (tmp_path / "town.jsonl").write_text(json.dumps({"text": "The fox sings in the old town.", "url": "https://t/1"}))
    return serve_engine(
        heads=str(heads(p_dev=4.0)),
        judge={"evidence": "pull"},
        plugins=[{"name": "search", "corpus": str(tmp_path / "town.jsonl")}],
    )


def body(**fields) -> dict:
    message = {"role": "user", "content": "The fox sings"}
    return {"model": "tiger", "messages": [message], "max_tokens": 8, "seed": 1, "creativity": 0.4} | fields


def test_an_answer_shows_what_was_doubted_looked_up_and_decided(served) -> None:
    sent = body(plugins=["search"], evidence=True)

    ensemble = httpx.post(f"{served.url}/v1/chat/completions", json=sent, timeout=60).json()["ensemble"]

    assert ensemble["verdict"] == "flagged" and ensemble["reasons"]
    assert ensemble["evidence"][0]["url"] == "https://t/1" and ensemble["evidence"][0]["source"] == "town.jsonl:1"
    assert all(span.keys() == {"start", "end", "text", "p_dev"} for span in ensemble["flagged"])


def test_evidence_is_given_to_those_who_ask_for_it(served) -> None:
    sent = body(plugins=["search", "search"])

    reply = httpx.post(f"{served.url}/v1/chat/completions", json=sent, timeout=60).json()

    assert not {"evidence", "reasons", "flagged"} & set(reply["ensemble"])


def test_a_stream_that_asks_for_a_plugin_is_held_and_names_its_phases(served) -> None:
    sent = body(plugins=["search"], stream=True)

    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=sent, timeout=60) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]

    phases = [chunk["ensemble"]["phase"] for chunk in chunks if "phase" in chunk.get("ensemble", {})]
    assert phases[:3] == ["draft", "judge", "search"]


@pytest.mark.parametrize("plugins", [["shell"], ["search", "calculator"], "search", [{"name": "search"}], ["x" * 65]])
def test_a_plugin_that_is_not_served_is_refused(served, plugins) -> None:
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body(plugins=plugins), timeout=60)

    assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("plugins")
