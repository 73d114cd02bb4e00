"""What travels between an island's ranks and the outer server: length-prefixed frames, a JSON header and raw bytes.

    4 bytes "TGI1" | header length, uint32 | body length, uint64 | header, JSON | body

Nothing is unpickled, and a length over its limit is refused before a byte of it is read. Whoever knows the shared
secret proves it by an HMAC over the server's nonce; the secret itself never travels. The traffic is not encrypted:
between sites it belongs into a tunnel.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"TGI1"
MAX_HEADER = 8 << 20
MAX_BODY = 64 << 30
_PREFIX = struct.Struct("<4sIQ")


class FrameError(Exception):
    """Bytes that are not a frame, or one that is larger than the receiver allows."""


@dataclass(frozen=True)
class Frame:
    header: dict[str, Any]
    body: bytes | bytearray | memoryview = b""


@dataclass(frozen=True)
class Limits:
    """Bytes that a receiver takes."""

    header: int = MAX_HEADER
    body: int = MAX_BODY


GREETING = Limits(header=4096, body=0)  # before the secret is proved


def proof(secret: str, nonce: str, island: int, rank: int) -> str:
    return hmac.new(secret.encode(), f"{nonce}/{island}/{rank}".encode(), hashlib.sha256).hexdigest()


def proves(given: Any, secret: str, nonce: str, island: int, rank: int) -> bool:
    """Compared in constant time."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), proof(secret, nonce, island, rank).encode())


async def read_frame(reader: asyncio.StreamReader, limits: Limits) -> Frame:
    """Raises: FrameError; asyncio.IncompleteReadError: the other side is gone."""
    header_size, body_size = _sizes(await reader.readexactly(_PREFIX.size), limits)
    header = _header(await reader.readexactly(header_size))
    return Frame(header, await reader.readexactly(body_size))


async def write_frame(writer: asyncio.StreamWriter, frame: Frame) -> None:
    writer.write(_start(frame))
    if len(frame.body):
        writer.write(frame.body)
    await writer.drain()


def receive(connection: socket.socket, limits: Limits) -> Frame:
    """Raises: FrameError; OSError: the other side is gone, or slower than the socket's timeout."""
    header_size, body_size = _sizes(_exactly(connection, _PREFIX.size), limits)
    header = _header(_exactly(connection, header_size))
    return Frame(header, _exactly(connection, body_size))


def send(connection: socket.socket, frame: Frame) -> None:
    connection.sendall(_start(frame))
    if len(frame.body):
        connection.sendall(frame.body)


def _start(frame: Frame) -> bytes:
    header = json.dumps(frame.header, separators=(",", ":")).encode()
    return _PREFIX.pack(MAGIC, len(header), len(frame.body)) + header


def _sizes(prefix: bytes | bytearray, limits: Limits) -> tuple[int, int]:
    magic, header_size, body_size = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FrameError("is not a frame")
    if header_size > limits.header or body_size > limits.body:
        raise FrameError(f"{header_size} + {body_size} bytes, at most {limits.header} + {limits.body} are taken here")
    return header_size, body_size


def _header(raw: bytes | bytearray) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise FrameError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise FrameError("its header is not an object")
    return header


def _exactly(connection: socket.socket, size: int) -> bytearray:
    received = bytearray(size)
    view = memoryview(received)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("closed by the other side")
        view = view[count:]
    return received
