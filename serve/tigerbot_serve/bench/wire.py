"""A lean HTTP/1.1 client: keep-alive connections, one exchange at a time each, bytes handed on as they arrive.

A general client (httpx) spends 1 to 2 ms of a core on a request, which would measure the client. This one knows neither
redirects nor proxies nor cookies: it talks to the address that was named and to no other.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Protocol
from urllib.parse import urlsplit

import httptools

IDLE_S = 2.0  # servers close idle connections after 5 s and more; one that is closing must not meet a request


class Lost(Exception):
    """The connection ended before the answer did. `began`: part of the answer was there."""

    def __init__(self, *, began: bool) -> None:
        super().__init__("the connection ended")
        self.began = began


class Reader(Protocol):
    """Takes an answer as it comes."""

    def head(self, status: int) -> None: ...

    def data(self, data: bytes) -> None: ...


class Connection(asyncio.Protocol):
    """One connection. `exchange` after `exchange`, until `usable` is false."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._reader: Reader | None = None
        self._done: asyncio.Future[None] | None = None
        self._head_seen = self._delimited = False
        self._keep = True
        self._idle_since = time.monotonic()

    @property
    def usable(self) -> bool:
        open_ = self._transport is not None and not self._transport.is_closing()
        return open_ and self._keep and time.monotonic() - self._idle_since < IDLE_S

    async def exchange(self, request: bytes, reader: Reader) -> None:
        """Send a request and feed its answer to `reader`.

        Raises:
            Lost: the connection ended too early.
        """
        assert self._transport is not None
        self._reader, self._head_seen, self._delimited = reader, False, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._reader = self._done = None
            self._idle_since = time.monotonic()

    def close(self) -> None:
        self._keep = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end(Lost(began=True))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep = False
        # An answer without a length ends with its connection; any other one was cut.
        whole = self._head_seen and not self._delimited and exc is None
        self._end(None if whole else Lost(began=self._head_seen))

    # the parser's side

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._delimited = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._reader is not None and status >= 200:
            self._head_seen = True
            self._reader.head(status)

    def on_body(self, data: bytes) -> None:
        if self._reader is not None:
            self._reader.data(data)

    def on_message_complete(self) -> None:
        if self._head_seen:
            self._keep = self._keep and self._parser.should_keep_alive()
            self._end(None)
            if not self._keep:
                self.close()

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


class Pool:
    """Connections to one address: an idle one where there is one, else a new one."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: list[Connection] = []

    async def take(self) -> Connection:
        """
        Raises:
            OSError: it cannot be reached.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection

    def give(self, connection: Connection) -> None:
        if connection.usable:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def request_bytes(url: str, body: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """A POST of a JSON body, ready to be written."""
    parts = urlsplit(url)
    data = body.encode()
    host = parts.netloc.rpartition("@")[2]
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        "accept: */*",
        "accept-encoding: identity",
        "user-agent: tiger-bench",
        f"content-length: {len(data)}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data
