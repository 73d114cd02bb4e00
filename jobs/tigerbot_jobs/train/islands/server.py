"""The outer server: islands' ranks bring deltas over TCP and take the new weights along. A process of its own.

    TIGER_ISLANDS_SECRET=... python -m tigerbot_jobs.train.islands.server FOLDER 127.0.0.1:7400 '{"count": 2}'

It writes `server.json` (where it listens) and `rounds.jsonl` (one line a round) into the folder beside its state. It
needs no torch. When its disk fails it ends, and whoever started it starts it again: nothing is lost by that.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot.errors import TigerError
from tigerbot.runs import write_json
from tigerbot_jobs.train.islands.frames import GREETING, Frame, FrameError, Limits, proves, read_frame, write_frame
from tigerbot_jobs.train.islands.layout import Piece, total
from tigerbot_jobs.train.islands.quantise import Codes, blocks, restore
from tigerbot_jobs.train.islands.rounds import Rounds, Settings

SECRET = "TIGER_ISLANDS_SECRET"
START_S = 120.0  # the first round waits so long for all islands to come
_GREETING_S = 10.0


class OuterServer:
    """Args:
    secret: what every rank must know.
    start_s: how long the first round waits for islands that have not come yet.
    """

    def __init__(self, rounds: Rounds, secret: str, folder: Path, *, start_s: float = START_S) -> None:
        self._rounds, self._secret, self._folder, self._start_s = rounds, secret, folder, start_s
        self._changed, self._poked = asyncio.Condition(), asyncio.Event()
        self._begun = rounds.round > 0
        self._first_came: float | None = None
        self._bytes = {"in": 0, "out": 0}

    async def serve(self, host: str, port: int) -> None:
        """Until cancelled, or until closing a round fails."""
        server = await asyncio.start_server(self._connection, host, port)
        host, port = server.sockets[0].getsockname()[:2]
        write_json(self._folder / "server.json", {"host": host, "port": port, "pid": os.getpid()})
        async with server:
            await self._close_rounds()

    async def _close_rounds(self) -> None:
        while True:
            due = self._rounds.closes_in()
            if due is not None and due <= 0:
                self._log(asdict(self._rounds.close()))
                self._begun = True
                await self._tell()
                continue
            if not self._begun and self._all_came():
                self._begun = True
                self._rounds.begin()
                await self._tell()
                continue
            if not self._begun and self._first_came is not None:
                due = min(due or self._start_s, max(0.0, self._first_came + self._start_s - time.monotonic()))
            try:
                await asyncio.wait_for(self._poked.wait(), due)
            except TimeoutError:
                continue
            self._poked.clear()

    def _all_came(self) -> bool:
        if self._rounds.state is None or self._first_came is None:
            return False
        late = time.monotonic() - self._first_came >= self._start_s
        return late or self._rounds.present >= self._rounds.settings.count

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, met: Callable[[], bool], reader: asyncio.StreamReader) -> None:
        """Wait; a rank that goes away meanwhile ends its connection."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(met)

        waiting, gone = asyncio.create_task(wait()), asyncio.create_task(reader.read(1))
        try:
            done, _ = await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (waiting, gone):
                task.cancel()
            await asyncio.gather(waiting, gone, return_exceptions=True)
        if waiting not in done:
            raise ConnectionError("the rank is gone")

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _notice_dead_peers(writer.get_extra_info("socket"))
            island = await self._greet(reader, writer)
            self._rounds.connected(island, 1)
            self._poked.set()
            try:
                while True:
                    await self._serve_one(island, reader, writer)
            finally:
                self._rounds.connected(island, -1)
                self._poked.set()
        except (FrameError, ValueError, KeyError, TypeError) as error:
            await _refuse(writer, str(error) if isinstance(error, FrameError | ValueError) else f"a bad frame: {error}")
        except (OSError, EOFError, TimeoutError):
            pass  # the rank is gone; it comes back or its island is not waited for
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        nonce = secrets.token_hex(16)
        await write_frame(writer, Frame({"nonce": nonce}))
        header = (await asyncio.wait_for(read_frame(reader, GREETING), _GREETING_S)).header
        island, rank = int(header["island"]), int(header["rank"])
        if not proves(header.get("proof"), self._secret, nonce, island, rank):
            raise FrameError("wrong secret")
        if not 0 <= island < self._rounds.settings.count:
            raise FrameError(f"island {island} of {self._rounds.settings.count}")
        await write_frame(writer, Frame({"round": self._rounds.round}))
        return island

    async def _serve_one(self, island: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        state = self._rounds.state
        limits = Limits(body=5 * state.layout.size) if state else Limits()
        frame = await read_frame(reader, limits)
        self._bytes["in"] += len(frame.body)
        match frame.header["op"]:
            case "join" | "seed":
                answer = await self._join(island, frame, reader)
            case "delta":
                answer = await self._delta(island, frame, reader)
            case "adopted":
                fields = ("round", "step", "began_step", "dropped_steps")
                self._rounds.adopted(island, *(int(frame.header[field]) for field in fields))
                return
            case "leave":
                self._rounds.leave(island)
                self._log({"left": island})
                self._poked.set()
                answer = Frame({})
            case op:
                raise FrameError(f"there is no {op!r}")
        self._bytes["out"] += len(answer.body)
        await write_frame(writer, answer)

    async def _join(self, island: int, frame: Frame, reader: asyncio.StreamReader) -> Frame:
        header, pieces = frame.header, _pieces(frame)
        sizes = {str(name): int(size) for name, size in header["sizes"].items()}
        self._rounds.check_model(sizes)
        if header["op"] == "seed":
            self._rounds.seed(str(header["incarnation"]), sizes, pieces, _values(frame.body, total(pieces)))
        elif self._rounds.state is None:
            return Frame({"seed": True})
        if self._first_came is None:
            self._first_came = time.monotonic()
        self._poked.set()
        await self._tell()
        await self._until(lambda: self._rounds.state is not None and self._begun, reader)
        self._rounds.check_model(sizes)
        self._rounds.report(island)
        return Frame(*self._rounds.answer(island, pieces, None))

    async def _delta(self, island: int, frame: Frame, reader: asyncio.StreamReader) -> Frame:
        header, pieces = frame.header, _pieces(frame)
        numel, round = total(pieces), int(header["round"])
        if header["quantized"]:
            if len(frame.body) != numel + 4 * blocks(numel):
                raise FrameError(f"{len(frame.body)} bytes for {numel} values")
            codes = np.frombuffer(frame.body, np.int8, numel)
            values = restore(Codes(codes, np.frombuffer(frame.body, np.float32, offset=numel)))
        else:
            values = _values(frame.body, numel)
        attempt = (str(header["incarnation"]), int(header["step"]))
        if self._rounds.deliver(island, attempt, round, pieces, values) == "unknown":
            return Frame({"unknown": True})
        self._poked.set()
        await self._until(lambda: self._rounds.round > round, reader)
        return Frame(*self._rounds.answer(island, pieces, (round, attempt[1])))

    def _log(self, row: dict[str, Any]) -> None:
        row |= {"t": time.time(), "deadline_s": self._rounds.deadline_s, "bytes": dict(self._bytes)}
        with (self._folder / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _pieces(frame: Frame) -> list[Piece]:
    return [Piece(str(name), int(start), int(numel)) for name, start, numel in frame.header["pieces"]]


def _values(body: bytes | bytearray | memoryview, numel: int) -> np.ndarray:
    if len(body) != 4 * numel:
        raise FrameError(f"{len(body)} bytes for {numel} values")
    return np.frombuffer(body, np.float32)


async def _refuse(writer: asyncio.StreamWriter, reason: str) -> None:
    try:
        await write_frame(writer, Frame({"error": reason}))
        # Closing with unread bytes would reset the connection, and the reason with it.
        await asyncio.sleep(0.2)
    except OSError:
        pass


def _notice_dead_peers(connection: socket.socket) -> None:
    """Within about 20 s, also where no byte says that the other side is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def main() -> None:
    folder, listen, given = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    start_s = given.pop("start_s", START_S)
    folder.mkdir(parents=True, exist_ok=True)
    host, _, port = listen.rpartition(":")
    secret = os.environ.get(SECRET, "")
    if not secret:
        raise SystemExit(f"{SECRET} is not set")

    async def serve() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        await OuterServer(Rounds(Settings(**given), folder), secret, folder, start_s=start_s).serve(host, int(port))

    try:
        asyncio.run(serve())
    except (asyncio.CancelledError, KeyboardInterrupt):
        return
    except (TigerError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
