"""How long a client may take for the head of its request, at every socket that our own processes listen on.

uvicorn waits for ever for a head that does not end, and Ray Serve passes none of its options on; both proxies and
replicas take uvicorn's protocol by the name "auto", which stands for ours here. HAProxy has the deadline, but Serve has
no setting for it: it is a line of the section in which Serve writes down `retry-on`.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from uvicorn import config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_TIMEOUT = "TIGER_SERVE_HEADER_TIMEOUT_S"
DEFAULT_S = 30.0
_LATE = {
    "error": {
        "message": "the head of the request was not there in time",
        "type": "invalid_request_error",
        "param": None,
        "code": "header_timeout",
    }
}
_BODY = json.dumps(_LATE).encode()
_ANSWER = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"x-should-retry: false\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


def be_impatient() -> None:
    """From now on every uvicorn of this process that is started with its defaults keeps the deadline."""
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Impatient.__name__}"


def haproxy_lines(header_timeout_s: float) -> dict[str, str]:
    """The deadline for HAProxy, as variables that Serve's template reads; at least a second, in whole ones."""
    retries = "conn-failure"  # Serve's own default
    line = f"timeout http-request {max(1, round(header_timeout_s))}s"
    return {
        "RAY_SERVE_HAPROXY_RETRY_ON": f"{retries}\n    {line}",
        "RAY_SERVE_HAPROXY_INGRESS_RETRY_ON": retries,
    }


_Uvicorns: Any = AutoHTTPProtocol


class Impatient(_Uvicorns):
    """uvicorn's HTTP/1.1 protocol with a deadline for each head: from the connection, or from a later head's first byte.

    Between an answer and the next byte it is uvicorn's keep-alive timeout that counts, in a body the gateway's own.
    """

    _timer: asyncio.TimerHandle | None = None
    _heard = False  # something of the head that is waited for

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._end()
        elif before is None or before.response_complete:
            self._heard = True
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        if self._timer is None:
            timeout_s = float(os.environ.get(HEADER_TIMEOUT) or DEFAULT_S)
            self._timer = self.loop.call_later(timeout_s, self._give_up)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._heard = None, False

    def _give_up(self) -> None:
        said, transport = self._heard, self.transport
        self._end()
        if transport.is_closing() or transport.get_protocol() is not self:  # a WebSocket has no more heads
            return
        if said:
            transport.write(_ANSWER)
        transport.close()
