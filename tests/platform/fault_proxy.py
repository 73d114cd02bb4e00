"""A small HTTP relay that does damage on purpose: it stands between a client and a server, both real.

Each request is answered by the server unless a `Fault` that matches its method is waiting; a fault is spent on the
number of requests it names. One connection carries one request.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from typing import Literal

Damage = Literal["kill_upload", "truncate_upload", "flip_upload", "kill_answer", "flip_answer", "status_500", "delay"]


@dataclass
class Fault:
    """`after_bytes` of the body pass before the damage; `delay` waits `seconds` before the request goes on."""

    damage: Damage
    method: str = ""
    times: int = 1
    after_bytes: int = 0
    seconds: float = 0.0


class FaultProxy:
    """Listens on a port of its own until `close()`. `requests` holds every method and path that came by."""

    def __init__(self, upstream_port: int, host: str = "127.0.0.1") -> None:
        self.upstream_port, self.host = upstream_port, host
        self.requests: list[tuple[str, str]] = []
        self.bytes_up = 0
        self._faults: list[Fault] = []
        self._on_their_way = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def hurt(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Forget faults and counts, once nothing is on its way any more: a late request would hurt the next test."""
        deadline = time.monotonic() + 10
        while self._on_their_way and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.bytes_up = 0

    def close(self) -> None:
        # shutdown() wakes accept(); close() alone would leave it waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fault_for(self, method: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.method in ("", method) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(30)
        try:
            with client:
                self._relay(client)
        except OSError:
            return  # one of the two ends went away: the other's connection ends with it

    def _relay(self, client: socket.socket) -> None:
        head, body = _read_head(client)
        if not head:
            return
        with self._lock:
            self._on_their_way += 1
        try:
            self._request(client, head, body)
        finally:
            with self._lock:
                self._on_their_way -= 1

    def _request(self, client: socket.socket, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if headers.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", "0"))
        with self._lock:
            self.requests.append((method, path))
        fault = self._fault_for(method)
        damage = fault.damage if fault else ""
        if fault and damage == "delay":
            time.sleep(fault.seconds)
        wanted = min(length, fault.after_bytes) if fault and damage == "kill_upload" else length
        while len(body) < wanted and (more := client.recv(65536)):
            body += more
        if damage == "kill_upload" or len(body) < wanted:
            return  # also where the client died: half a request is none
        if damage == "status_500":
            text = b"<Error><Code>InternalError</Code><Message>on purpose</Message></Error>"
            client.sendall(
                b"HTTP/1.1 500 Oops\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(text), text)
            )
            return
        if fault and damage == "truncate_upload":
            body = body[: fault.after_bytes]
        if fault and damage == "flip_upload":
            body = _flipped(body, fault.after_bytes)
        with self._lock:
            self.bytes_up += len(body)
        dropped = ("expect", "connection", "content-length")
        kept = [line for line in lines[1:] if line and line.partition(":")[0].lower() not in dropped]
        sent = "\r\n".join([lines[0], *kept, f"Content-Length: {len(body)}", "Connection: close", "", ""])
        with socket.create_connection(("127.0.0.1", self.upstream_port), timeout=30) as server:
            server.sendall(sent.encode("latin-1") + body)
            _answer(server, client, fault)


def _answer(server: socket.socket, client: socket.socket, fault: Fault | None) -> None:
    head, body = _read_head(server)
    client.sendall(head + b"\r\n\r\n")
    passed = 0
    while body or (body := server.recv(65536)):
        if fault and fault.damage == "flip_answer" and passed <= fault.after_bytes < passed + len(body):
            body = _flipped(body, fault.after_bytes - passed)
        if fault and fault.damage == "kill_answer" and passed + len(body) > fault.after_bytes:
            client.sendall(body[: fault.after_bytes - passed])
            return
        client.sendall(body)
        passed += len(body)
        body = b""


def _read_head(end: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = end.recv(65536)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
