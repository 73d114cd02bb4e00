"""The OpenAPI document: current, valid, and true of what clients send and what the server answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tigerbot_serve.gateway import openapi
from tigerbot_serve.gateway.openapi import document
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody

ROOT = Path(__file__).parents[3]
ASK = [{"role": "user", "content": "狐狸在河边唱歌。"}]
WHOLE = document()


def checked(name: str, value: Any, *, closed: bool = False) -> None:
    """`value` is what the document calls `name`; closed: and has no field that the document lacks."""
    components = json.loads(json.dumps(WHOLE["components"]))
    if closed:
        for schema in components["schemas"].values():
            if "properties" in schema:
                schema["additionalProperties"] = False
    whole = {"$ref": f"#/components/schemas/{name}", "components": components}
    jsonschema.Draft202012Validator(whole).validate(value)


def test_the_copy_in_docs_is_current() -> None:
    written = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")

    assert written == openapi.text(), "python -m tigerbot_serve.gateway.openapi > docs/openapi.json"


def test_every_reference_leads_somewhere_and_every_schema_is_one() -> None:
    text = json.dumps(WHOLE)
    for place in {part.split('"')[0] for part in text.split('"$ref": "#/')[1:]}:
        found: Any = WHOLE
        for step in place.split("/"):
            found = found[step]
    for schema in WHOLE["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_our_own_fields_are_explained() -> None:
    fields = {**ChatBody.model_fields, **CompletionBody.model_fields}

    assert set(openapi.ABOUT) <= set(fields)


def test_every_route_of_the_api_is_in_it(serve_engine) -> None:
    served = serve_engine()

    got = httpx.get(f"{served.url}/openapi.json", timeout=30)

    assert got.json() == WHOLE and got.headers["content-type"] == "application/json"
    for path, methods in WHOLE["paths"].items():
        for method in methods:
            answer = httpx.request(method, served.url + path.replace("{name}", "tiger"), timeout=30)
            assert answer.status_code in (200, 400), path  # 400: these bodies are empty
            if answer.status_code == 400:
                checked("Error", answer.json(), closed=True)


def sent_bodies() -> list[tuple[str, dict[str, Any]]]:
    """What the official client sends for calls as people write them."""
    sent: list[tuple[str, dict[str, Any]]] = []

    def catch(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, json.loads(request.content)))
        return httpx.Response(400, json={"error": {"message": "m", "type": "t", "param": None, "code": None}})

    api: Any = openai.OpenAI(
        base_url="http://none.invalid/v1",
        api_key="k",
        max_retries=0,
        http_client=httpx.Client(transport=httpx.MockTransport(catch)),
    )
    parts = [{"role": "developer", "content": "简短"}, {"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    calls = [
        lambda: api.chat.completions.create(model="tiger", messages=ASK),
        lambda: api.chat.completions.create(
            model="tiger",
            messages=parts,
            temperature=0.2,
            top_p=0.9,
            n=2,
            stop=["。"],
            seed=5,
            max_completion_tokens=9,
            logprobs=True,
            top_logprobs=3,
            user="u",
            extra_body={"creativity": 0.4, "verify": True, "max_rewrites": 1, "ensemble_tokens": True},
        ),
        lambda: api.chat.completions.create(
            model="tiger", messages=ASK, stream=True, stream_options={"include_usage": True}, stop="x"
        ),
        lambda: api.completions.create(model="tiger", prompt="The fox", max_tokens=3, logprobs=2),
        lambda: api.completions.create(model="tiger", prompt=[1, 2, 3]),
        lambda: api.embeddings.create(model="tiger", input="hi"),
        lambda: api.embeddings.create(model="tiger", input=["a", "b"], encoding_format="float", dimensions=8),
        lambda: api.embeddings.create(model="tiger", input=[[1, 2], [3]]),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError):
            call()
    return sent


def test_bodies_of_the_official_client_are_valid() -> None:
    sent = sent_bodies()

    assert len(sent) == 8
    for path, body in sent:
        operation = WHOLE["paths"][path]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        checked(reference.rsplit("/", 1)[1], body)


def test_answers_are_what_the_document_says_and_no_more(serve_engine, heads) -> None:
    served = serve_engine(heads=str(heads(p_dev=3.0)))
    http = httpx.Client(base_url=served.url, timeout=60)
    chat = {"model": "tiger", "messages": ASK, "max_tokens": 6, "seed": 1}
    plain = {"model": "tiger", "prompt": "The fox", "max_tokens": 4, "seed": 1}

    def post(path: str, **body: Any) -> Any:
        return http.post(path, json=body).raise_for_status().json()

    def events(path: str, **body: Any) -> list[Any]:
        lines = http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text.split(
            "\n"
        )
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    wordy = {"logprobs": True, "top_logprobs": 2, "ensemble_tokens": True, "verify": True, "n": 2}
    checked("ChatCompletion", post("/v1/chat/completions", **chat, **wordy), closed=True)
    for chunk in events("/v1/chat/completions", **chat, **wordy):
        checked("ChatChunk", chunk, closed=True)
    checked("Completion", post("/v1/completions", **plain, logprobs=2), closed=True)
    for chunk in events("/v1/completions", **plain, logprobs=2):
        checked("Completion", chunk, closed=True)
    for form in ("float", "base64"):
        vectors = post("/v1/embeddings", model="tiger", input=["a", "b"], encoding_format=form)
        checked("EmbeddingList", vectors, closed=True)
    checked("ModelList", http.get("/v1/models").json(), closed=True)
    checked("Model", http.get("/v1/models/tiger").json(), closed=True)
    checked("Health", http.get("/healthz").json(), closed=True)
    for refused in (http.get("/v1/nothing"), http.post("/v1/completions", content=b"{"), http.get("/v1/embeddings")):
        assert refused.status_code in (400, 404, 405)
        checked("Error", refused.json(), closed=True)
