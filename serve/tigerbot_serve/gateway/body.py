"""A request's body: bounded while it is read, JSON of bounded depth, text that can be encoded."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from tigerbot_serve.gateway.errors import ApiError

MAX_DEPTH = 32


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiError: 413 as soon as more than `max_bytes` were announced or sent; 400 when it is not a JSON object of
            UTF-8 text at most 32 levels deep.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body was complete", code="client_disconnected") from None
    return parse_object(b"".join(parts))


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in these bytes; ApiError 400 says what is wrong with it."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
        # "\ud800" is valid JSON and no text: a tokenizer would fail on it much later.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("the body holds half a surrogate pair, which is no text") from None
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _bad(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _bad(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise _bad("the body holds a number that is not one (NaN, Infinity, or thousands of digits)") from None
    if not isinstance(value, dict):
        raise _bad(f"the body wants to be a JSON object; got {type(value).__name__}")
    if _deeper_than(value, MAX_DEPTH):
        raise _bad(f"the body is nested deeper than {MAX_DEPTH} levels")
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> list[Any]:
    inside = node.values() if isinstance(node, dict) else node
    return [child for child in inside if isinstance(child, dict | list)]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _bad(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes:,} bytes",
        code="request_too_large",
        headers={"connection": "close", "x-should-retry": "false"},
    )
