"""The endpoint's OpenAPI 3.1 document, made from the types that bodies are checked with and answers are described by.

`python -m tigerbot_serve.gateway.openapi > docs/openapi.json` writes the copy that is checked in.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from tigerbot_serve.gateway import shapes
from tigerbot_serve.gateway.embeddings import EmbeddingBody
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody

BODIES = (ChatBody, CompletionBody, EmbeddingBody)
ANSWERS = (
    shapes.ChatCompletion,
    shapes.ChatChunk,
    shapes.Completion,
    shapes.EmbeddingList,
    shapes.ModelList,
    shapes.Model,
    shapes.Health,
    shapes.Live,
    shapes.Error,
)
ABOUT = {
    "creativity": "The dial: 0 is the factual member alone, 1 the creative member alone.",
    "verify": "Have the answer judged before any of it is shown; left out, only where a chat answer is not streamed.",
    "max_rewrites": "How often a doubtful answer may be written anew.",
    "compare": "Three answers of one seed: the creative member, the factual member, the dial that is set.",
    "plugins": "Plug-ins of the server, by name, that may be asked about what the judge doubts.",
    "evidence": "Give what the judge doubted, what was found about it, and why an answer was changed or not.",
    "timeline": "Give when the request was admitted, when its first token came, and so on, in milliseconds.",
    "ensemble_tokens": "Give every token's p_div, p_dev and creative weight w, and whether the gate skipped a member for it.",
    "seed": "The same seed, body and model give the same answer.",
}
ERRORS = {
    400: "The body is wrong; `param` names the field.",
    401: "The key is absent, unknown or expired.",
    404: "No such model or path.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "The server failed on this request.",
    503: "The engine is not running.",
    504: "The answer took longer than the server allows; `x-should-retry: false`.",
}
_ID = {"x-request-id": {"schema": {"type": "string"}, "description": "Find the request in the server's log by it."}}
_IGNORED = {
    "x-ignored-fields": {"schema": {"type": "string"}, "description": "Fields of the body that are not known here."}
}


async def serve(request: Request) -> Response:
    """`/openapi.json`. It holds nothing of this server's own, and so needs no key."""
    return Response(text(), media_type="application/json")


@cache
def text() -> str:
    return json.dumps(document(), ensure_ascii=False, indent=1) + "\n"


def document() -> dict[str, Any]:
    """The document as plain data."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "TigerBot endpoint",
            "version": version("tigerbot-platform"),
            "description": "OpenAI's protocol over an ensemble of a creative and a factual model, with a dial.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _error(text) for status, text in ERRORS.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths() -> dict[str, Any]:
    chat, plain, vectors = BODIES
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/chat/completions": {
            "post": _post("createChatCompletion", "Answer a chat.", chat, shapes.ChatCompletion, shapes.ChatChunk)
        },
        "/v1/completions": {
            "post": _post("createCompletion", "Go on with a text.", plain, shapes.Completion, shapes.Completion)
        },
        "/v1/embeddings": {
            "post": _post("createEmbedding", "Vectors of texts, of length 1.", vectors, shapes.EmbeddingList)
        },
        "/v1/models": {"get": _get("listModels", "The models served here.", shapes.ModelList, (401,))},
        "/v1/models/{name}": {
            "get": _get("retrieveModel", "One model.", shapes.Model, (401, 404)) | {"parameters": [name]}
        },
        "/v1/live": {"get": _get("live", "What a replica does now.", shapes.Live, (401,))},
        "/healthz": {
            "get": _get("health", "Whether the engine runs; 503 where it does not.", shapes.Health, ())
            | {"security": []}
        },
    }


def _post(
    name: str, summary: str, body: type[BaseModel], answer: type[BaseModel], chunk: type[BaseModel] | None = None
) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}}
    if chunk is not None:
        # A stream's schema is that of its events' data: OpenAPI 3.1 has no other way to say it.
        content["text/event-stream"] = {"schema": _ref(chunk)}
    good = {"description": "The answer; with `stream`, events.", "headers": _ID | _IGNORED, "content": content}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {"200": good} | {str(status): _shared(status) for status in ERRORS},
    }


def _get(name: str, summary: str, answer: type[BaseModel], errors: tuple[int, ...]) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}}
    good = {"description": "It.", "headers": _ID, "content": content}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": good} | {str(status): _shared(status) for status in errors},
    }


def _schemas() -> dict[str, Any]:
    kinds = [(kind, "validation") for kind in (*BODIES, *ANSWERS)]
    _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = found["$defs"]
    for body in BODIES:
        for name, field in schemas[body.__name__]["properties"].items():
            if name in ABOUT:
                field["description"] = ABOUT[name]
    return dict(sorted(schemas.items()))


def _error(about: str) -> dict[str, Any]:
    return {
        "description": about,
        "headers": _ID,
        "content": {"application/json": {"schema": _ref(shapes.Error)}},
    }


def _shared(status: int) -> dict[str, str]:
    return {"$ref": f"#/components/responses/{status}"}


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


if __name__ == "__main__":
    print(text(), end="")
