"""A TCP relay in a process of its own, to stand between two endpoints and be a bad line.

`Relay(host, port)` listens on a port of its own and passes bytes on. What it does to them is set while it runs: latency,
a rate, a stall (bytes wait, nothing is closed), one half closed, all connections reset. "up" is from who connects
to the target, "down" the other way. It knows nothing of what it passes on.

    python relay.py LISTEN_HOST LISTEN_PORT HOST PORT      commands as JSON lines on stdin, an answer for each
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

Way = Literal["up", "down"]
WAYS: tuple[Way, Way] = ("up", "down")
CHUNK = 65536


class Relay:
    """The relay seen from a test; a context manager. It ends with the process that made it.

    Args:
        prefix: put before the command, to run it on another network (`Network.command`).
    """

    def __init__(
        self, host: str, port: int, *, listen: str = "127.0.0.1", listen_port: int = 0, prefix: Sequence[str] = ()
    ) -> None:
        command = [*prefix, sys.executable, "-I", "-S", __file__, listen, str(listen_port), host, str(port)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.host = listen
        self.port: int = self._answer()["port"]

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.kill()
        self._popen.wait()

    def latency(self, seconds: float, *ways: Way) -> None:
        """Each byte arrives that much later; 0 takes it away."""
        self._tell("latency", ways, seconds)

    def rate(self, bytes_per_s: float | None, *ways: Way) -> None:
        """Over all connections together, each way for itself."""
        self._tell("rate", ways, bytes_per_s)

    def stall(self, *ways: Way) -> None:
        """Nothing passes and nobody is told, as when packets are lost; new connections are made and stay silent."""
        self._tell("stall", ways, True)

    def go_on(self, *ways: Way) -> None:
        """What waited in a stall passes now."""
        self._tell("stall", ways, False)

    def half_close(self, way: Way) -> None:
        """End that direction of every open connection; the other one stays."""
        self._tell("half_close", (way,), None)

    def cut(self) -> int:
        """Reset every open connection; how many there were."""
        return self._tell("cut", WAYS, None)["connections"]

    def passed(self) -> dict[str, int]:
        """Bytes that went each way."""
        return self._tell("passed", WAYS, None)["passed"]

    def _tell(self, what: str, ways: Sequence[Way], value: Any) -> dict[str, Any]:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps({"what": what, "ways": ways or WAYS, "value": value}) + "\n")
        self._popen.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError("the relay ended")
        return json.loads(line)


@dataclass
class _Line:
    """One way of all connections."""

    latency_s: float = 0.0
    rate: float | None = None
    free_at: float = 0.0  # when the bytes sent before have passed at this rate
    passed: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def carry(self, size: int, sent_at: float) -> None:
        """Wait as long as these bytes need on this line."""
        clock = asyncio.get_running_loop().time
        if self.rate:
            self.free_at = max(self.free_at, clock()) + size / self.rate
            await asyncio.sleep(self.free_at - clock())
        await asyncio.sleep(max(sent_at + self.latency_s - clock(), 0))
        await self.open.wait()
        self.passed += size


class _Server:
    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.lines: dict[str, _Line] = {way: _Line() for way in WAYS}
        for line in self.lines.values():
            line.open.set()
        self.pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.transport.abort()
            return
        pair = (far_writer, writer)
        self.pairs.add(pair)
        try:
            await asyncio.gather(
                self._pass(reader, far_writer, self.lines["up"]), self._pass(far_reader, writer, self.lines["down"])
            )
        finally:
            self.pairs.discard(pair)
            for end in pair:
                end.close()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, line: _Line) -> None:
        """Two tasks, so that bytes on their way do not keep the next ones from setting out."""
        on_their_way: asyncio.Queue[tuple[bytes, float]] = asyncio.Queue(maxsize=256)

        async def take() -> None:
            data = b"."
            while data:
                with suppress(OSError):
                    data = await source.read(CHUNK)
                await on_their_way.put((data, asyncio.get_running_loop().time()))

        taking = asyncio.create_task(take())
        try:
            while True:
                data, sent_at = await on_their_way.get()
                await line.carry(len(data), sent_at)
                if not data:
                    break
                target.write(data)
                await target.drain()
            target.write_eof()
        except OSError:
            target.transport.abort()
        finally:
            taking.cancel()

    def obey(self, told: dict[str, Any]) -> dict[str, Any]:
        what, value = told["what"], told["value"]
        for line in (self.lines[way] for way in told["ways"]):
            if what == "latency":
                line.latency_s = value
            elif what == "rate":
                line.rate, line.free_at = value, 0.0
            elif what == "stall":
                line.open.clear() if value else line.open.set()
        if what == "half_close":
            for pair in self.pairs:
                with suppress(OSError):
                    pair[WAYS.index(told["ways"][0])].write_eof()
        count = len(self.pairs)
        if what == "cut":
            for end in [end for pair in self.pairs for end in pair]:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.transport.abort()
        return {"connections": count, "passed": {way: line.passed for way, line in self.lines.items()}}


async def main(listen: str, listen_port: str, host: str, port: str) -> None:
    relay = _Server(host, int(port))
    server = await asyncio.start_server(relay.serve, listen, int(listen_port))
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        print(json.dumps(relay.obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
