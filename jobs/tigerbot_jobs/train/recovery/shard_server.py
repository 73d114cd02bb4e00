"""Shards between nodes: a keeper serves those it holds and takes in copies of its neighbour's.

The wire is a JSON line, then bytes; whoever does not know the run's secret gets neither.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any, BinaryIO

_PUSH_TIMEOUT_S = 5.0  # a peer that is silent holds no copy up for longer: the next one waits
_MIRRORS_KEPT = 2
_FETCH_LIMIT = 64 * 2**30


def push_shard(address: str, token: str, about: dict[str, Any], image: bytes) -> None:
    """Give a copy of a shard to another node's keeper.

    Raises:
        OSError: it did not take it.
    """
    with dial(address, _PUSH_TIMEOUT_S) as peer:
        line = json.dumps({"token": token, "put": about, "size": len(image)}).encode() + b"\n"
        peer.sendall(line)
        peer.sendall(image)
        if not peer.recv(1):
            raise ConnectionError(f"{address} did not take the copy")


def fetch_range(peer: socket.socket, token: str, path: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file of another node."""
    peer.sendall(json.dumps({"token": token, "get": path, "begin": begin, "end": end}).encode() + b"\n")
    data = bytearray(end - begin)
    view, got = memoryview(data), 0
    while got < len(data):
        count = peer.recv_into(view[got:])
        if count == 0:
            raise ConnectionError(f"Connection closed by peer while reading {path}")
        got += count
    return bytes(data)


def dial(address: str, timeout_s: float = 30.0) -> socket.socket:
    """A connection to a keeper; the timeout is for every send and receive too."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


class ShardServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], token: str, root: Path, folder: Path) -> None:
        self.token, self.root, self.folder = token, root.resolve(), folder
        self.closed = False  # nothing more is taken in
        super().__init__(address, _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: ShardServer

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            while line := self.rfile.readline(65_536):
                asked = json.loads(line)
                if not hmac.compare_digest(str(asked["token"]), self.server.token):
                    return
                if "put" in asked:
                    self._put(asked["put"], int(asked["size"]))
                else:
                    self._get(asked["get"], int(asked["begin"]), int(asked["end"]))

    def _get(self, path: str, begin: int, end: int) -> None:
        resolved = Path(path).resolve()
        if not resolved.is_relative_to(self.server.root) or not 0 <= begin <= end:
            raise ValueError(path)
        with resolved.open("rb") as file:
            self.connection.sendfile(file, begin, end - begin) if end > begin else None

    def _put(self, about: dict[str, Any], size: int) -> None:
        numbers = [int(about[name]) for name in ("step", "generation", "rank", "world_size", "zero_stage")]
        name = f"mirror-{Path(about['name']).name}." + ".".join(map(str, numbers))
        if self.server.closed:
            raise ValueError("closed")
        staged = self.server.folder / f"in-{threading.get_ident()}"
        with staged.open("wb") as file:
            _copy(self.rfile, file, min(size, _FETCH_LIMIT))
        staged.replace(self.server.folder / name)
        older = sorted(self.server.folder.glob(f"mirror-{Path(about['name']).name}.*"), key=lambda p: p.stat().st_mtime)
        for path in older[:-_MIRRORS_KEPT]:
            path.unlink(missing_ok=True)
        for path in self.server.folder.glob("mirror-*"):  # of the dead, two generations ago
            if int(path.name.rsplit(".", 4)[1]) < int(about["generation"]) - 1:
                path.unlink(missing_ok=True)
        self.wfile.write(b"\n")


def _copy(source: Any, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, 1 << 20))
        if not data:
            raise ValueError("cut off")
        target.write(data)
        size -= len(data)
