"""What an HTTP client is told when a request cannot be served: OpenAI's error shape, everywhere.

This module knows nothing about the engine. `ApiError` is raised anywhere below a route and becomes one JSON answer.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer `{"error": {"message", "type", "param", "code"}}` with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def too_late(seconds: float) -> ApiError:
    """Our own deadline. The OpenAI SDKs retry 408 and 5xx, which would triple the load: told not to."""
    return ApiError(
        504,
        f"the answer took longer than {seconds:g} s; ask for fewer max_tokens",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def broken() -> ApiError:
    """A bug or a dead engine: nothing of it is shown to the client, its traceback is in the replica's log."""
    return ApiError(500, "the server failed on this request; it is in its log under x-request-id", code="server_error")


def no_memory() -> ApiError:
    """Nothing is wrong with the request: with less beside it, or on another replica, it fits."""
    message = "there was no memory for this request just now; ask again"
    return ApiError(503, message, code="out_of_memory", headers={"retry-after": "1"})


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_exceeded"
    return "server_error" if status >= 500 else "invalid_request_error"
