"""`/v1/embeddings`: texts or token ids in, one vector each out, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tigerbot.chat import encode_plain
from tigerbot.errors import InputError, ServeError
from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.memory import NoMemory
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.gateway.decode import POLL_S, ClientGone, Decoder
from tigerbot_serve.gateway.errors import ApiError, broken, no_memory, too_late

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingBody(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, hide_input_in_errors=True)

    model: str
    input: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


async def texts_of(body: EmbeddingBody, engine: Decoder, spec: ServeSpec) -> list[tuple[int, ...]]:
    """A body's inputs as token ids, within the limits.

    Raises:
        ApiError: 404 another model, 400 what does not fit.
    """
    if body.model != spec.model_name:
        message = f"model {body.model!r} is not served here; {spec.model_name!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")
    # Tokenizing much text takes a while: not on the loop that serves everybody.
    return await asyncio.to_thread(_ids, body, engine, spec)


async def embed(
    texts: list[tuple[int, ...]],
    body: EmbeddingBody,
    engine: Decoder,
    spec: ServeSpec,
    disconnected: Callable[[], Any],
) -> dict[str, Any]:
    """The answer to a body whose inputs are `texts`.

    Raises:
        ApiError: 400 too many dimensions, 429 too many wait, 503 and 504 as for answers.
        ClientGone: the client left.
    """
    vectors = await _vectors(texts, engine, spec, disconnected)
    width = vectors.shape[1]
    if body.dimensions is not None and body.dimensions > width:
        raise _bad(f"wants at most {width}, the model's width", param="dimensions")
    if body.dimensions is not None:
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    shown = [_base64(row) if body.encoding_format == "base64" else row.tolist() for row in vectors]
    tokens = sum(map(len, texts))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(shown)],
        "model": spec.model_name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _vectors(
    texts: list[tuple[int, ...]], engine: Decoder, spec: ServeSpec, disconnected: Callable[[], Any]
) -> Any:
    try:
        reading = asyncio.wrap_future(engine.embed(texts))
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"}) from None
    except InputError as error:
        raise _bad(str(error)) from None
    except ServeError:
        raise ApiError(503, "the engine is not running", code="engine_down", headers={"retry-after": "5"}) from None
    timeout_s = spec.http.request_timeout_s
    until = asyncio.get_running_loop().time() + timeout_s
    try:
        while not reading.done():
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                raise too_late(timeout_s)
            await asyncio.wait({reading}, timeout=min(POLL_S, left))
            if not reading.done() and await disconnected():
                raise ClientGone
        return reading.result()
    except NoMemory:
        raise no_memory() from None
    except ServeError:
        raise broken() from None
    finally:
        reading.cancel()


def _ids(body: EmbeddingBody, engine: Decoder, spec: ServeSpec) -> list[tuple[int, ...]]:
    """Every input as token ids, within the limits."""
    limits = spec.embedding
    given: list[Any] = [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else [*body.input]
    if len(given) > limits.max_inputs:
        raise _bad(f"holds {len(given)} inputs; at most {limits.max_inputs} are taken")
    begin = [] if engine.tokenizer.bos_token_id is None else [engine.tokenizer.bos_token_id]
    texts = []
    for index, one in enumerate(given):
        if not one:
            raise _bad(f"input {index} is empty")
        ids = [*begin, *encode_plain(engine.tokenizer, one)] if isinstance(one, str) else one
        if len(ids) > engine.max_length:
            message = f"input: input {index} has {len(ids)} tokens; at most {engine.max_length} fit"
            raise ApiError(400, message, param="input", code="context_length_exceeded")
        texts.append(tuple(ids))
    if (total := sum(map(len, texts))) > limits.max_tokens:
        raise _bad(f"holds {total} tokens; at most {limits.max_tokens} are taken at once")
    return texts


def _base64(vector_d: Any) -> str:
    return base64.b64encode(vector_d.numpy().astype("<f4").tobytes()).decode()


def _bad(message: str, param: str = "input") -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
