"""A request's body: bounded in size, depth, messages and time while it is read; JSON of text that can be encoded."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.scan import OutOfBounds, Scanner

MAX_DEPTH = 32


async def read_object(
    request: Request, max_bytes: int, *, max_messages: int = 256, timeout_s: float = 30.0
) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiError: 413 as soon as more than `max_bytes` were announced or sent; 408 when it is not there after
            `timeout_s`; 400 when it is not a JSON object of UTF-8 text, as soon as it is more than 32 levels deep or
            has more than `max_messages` messages.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size, scanner = 0, Scanner(MAX_DEPTH, max_messages)
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                _scan(scanner, part, hang_up=True)
                parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body was complete", code="client_disconnected") from None
    except TimeoutError:
        raise _too_slow(timeout_s) from None
    return _parsed(b"".join(parts))


def parse_object(data: bytes, *, max_messages: int = 256) -> dict[str, Any]:
    """The JSON object in these bytes; ApiError 400 says what is wrong with it."""
    _scan(Scanner(MAX_DEPTH, max_messages), data, hang_up=False)
    return _parsed(data)


def _scan(scanner: Scanner, data: bytes, *, hang_up: bool) -> None:
    try:
        scanner.feed(data)
    except OutOfBounds as bound:
        code = "invalid_value" if bound.param else "invalid_json"
        headers = {"connection": "close"} if hang_up else {}  # what is left of the body is not read
        raise ApiError(400, bound.message, param=bound.param, code=code, headers=headers) from None


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        # "\ud800" is valid JSON and no text: a tokenizer would fail on it much later.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("the body holds half a surrogate pair, which is no text") from None
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _bad(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError:
        raise _bad("the body holds a number that is none (NaN, Infinity, too large, or thousands of digits)") from None
    if not isinstance(value, dict):
        raise _bad(f"the body wants to be a JSON object; got {type(value).__name__}")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # 1e999
        raise ValueError(digits[:20])
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _bad(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _too_slow(timeout_s: float) -> ApiError:
    return ApiError(
        408,
        f"the body was not there after {timeout_s:g} s",
        code="body_timeout",
        headers={"connection": "close", "x-should-retry": "false"},
    )


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes:,} bytes",
        code="request_too_large",
        headers={"connection": "close", "x-should-retry": "false"},
    )
