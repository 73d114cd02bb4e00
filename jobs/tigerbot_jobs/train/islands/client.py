"""How one rank speaks to the outer server. Blocking; a connection that breaks is made again until patience ends."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tigerbot.errors import TigerError
from tigerbot_jobs.train.islands.frames import GREETING, Frame, FrameError, Limits, proof, receive, send
from tigerbot_jobs.train.islands.layout import Piece, restore_pieces, scales_of, total
from tigerbot_jobs.train.islands.quantise import Codes

_STEP_S = 5.0  # to connect and be greeted


@dataclass(frozen=True)
class Answer:
    """Weights of the rank's pieces at the start of round `round`, and what the server says beside them."""

    round: int
    weights: np.ndarray
    header: dict[str, Any]


class Unreachable(Exception):
    """Patience ended without an answer."""


class UnknownRound(Exception):
    """The server does not know the round: it has lost its state, and the island must join it again."""


class Client:
    """Args:
    incarnation: of the island's process group: its ranks share it, a new group has a new one.
    """

    def __init__(self, address: str, secret: str, *, island: int, rank: int, incarnation: str) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._secret = (host, int(port)), secret
        self._island, self._rank, self._incarnation = island, rank, incarnation
        self._connection: socket.socket | None = None

    def join(
        self, sizes: Mapping[str, int], pieces: Sequence[Piece], values: np.ndarray, *, patience_s: float
    ) -> Answer:
        """Weights to go on from. A server that has none takes this island's.

        Raises:
            Unreachable: nobody answered.
            TigerError: the server refuses: another secret, another model.
        """
        asked = {"op": "join", "sizes": dict(sizes), "pieces": _wire(pieces), "incarnation": self._incarnation}
        until = time.monotonic() + patience_s
        frame = self._ask(Frame(asked), pieces, patience_s=patience_s, reach_s=patience_s)
        if frame.header.get("seed"):
            left = max(1.0, until - time.monotonic())
            seed = Frame(asked | {"op": "seed"}, values.astype(np.float32).tobytes())
            frame = self._ask(seed, pieces, patience_s=left, reach_s=left)
        return _answer(frame, pieces, None)

    def exchange(
        self,
        round: int,
        step: int,
        pieces: Sequence[Piece],
        delta: Codes | np.ndarray,
        base: np.ndarray,
        *,
        patience_s: float,
        reach_s: float,
    ) -> Answer:
        """Bring a delta of `round`, whose weights were `base`; take the next weights, counted or not.

        It waits for an answer for `patience_s`, and for a server that cannot be reached for `reach_s`.

        Raises:
            Unreachable: no answer came: go on, and try again later.
            UnknownRound, TigerError
        """
        quantized = isinstance(delta, Codes)
        body = delta.codes.tobytes() + delta.scales.tobytes() if quantized else delta.astype(np.float32).tobytes()
        header = {"op": "delta", "round": round, "step": step, "quantized": quantized, "pieces": _wire(pieces)}
        header["incarnation"] = self._incarnation
        frame = self._ask(Frame(header, body), pieces, patience_s=patience_s, reach_s=reach_s)
        if frame.header.get("unknown"):
            raise UnknownRound
        return _answer(frame, pieces, base)

    def adopted(self, round: int, step: int, began_step: int, dropped_steps: int) -> None:
        """Say that the whole island has taken a round's weights. When it does not arrive, a restart redoes more."""
        header = {"op": "adopted", "round": round, "step": step, "began_step": began_step}
        if self._connection is not None:
            with contextlib.suppress(OSError):
                send(self._connection, Frame(header | {"dropped_steps": dropped_steps}))

    def leave(self) -> None:
        """Say that the island has made all its steps."""
        with contextlib.suppress(Unreachable):
            self._ask(Frame({"op": "leave"}), [], patience_s=_STEP_S, reach_s=_STEP_S)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, frame: Frame, pieces: Sequence[Piece], *, patience_s: float, reach_s: float) -> Frame:
        limits = Limits(body=4 * total(pieces) + 4 * scales_of(pieces))
        began = reached = time.monotonic()
        wait = 0.05
        while True:
            try:
                connection = self._connected()
                reached = time.monotonic()
                # The body may take long on a slow link: a send is bounded as a whole by the patience.
                connection.settimeout(max(0.1, began + patience_s - time.monotonic()))
                send(connection, frame)
                reply = receive(connection, limits)
            except (OSError, FrameError) as error:
                self.close()
                now = time.monotonic()
                if now - began >= patience_s or now - reached >= reach_s:
                    raise Unreachable(f"{self._address[0]}:{self._address[1]}: {error}") from None
                time.sleep(wait)
                wait = min(1.0, 2 * wait)
                continue
            return _checked(reply, self._address)

    def _connected(self) -> socket.socket:
        if self._connection is None:
            connection = socket.create_connection(self._address, timeout=_STEP_S)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                nonce = str(receive(connection, GREETING).header.get("nonce"))
                who = {"island": self._island, "rank": self._rank}
                send(connection, Frame(who | {"proof": proof(self._secret, nonce, self._island, self._rank)}))
                _checked(receive(connection, GREETING), self._address)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def _checked(reply: Frame, address: tuple[str, int]) -> Frame:
    if "error" in reply.header:
        raise TigerError(
            f"the outer server refuses: {reply.header['error']}",
            where=f"{address[0]}:{address[1]}",
            fix="the islands of a run share one spec and TIGER_ISLANDS_SECRET",
        )
    return reply


def _answer(frame: Frame, pieces: Sequence[Piece], base: np.ndarray | None) -> Answer:
    numel, header = total(pieces), frame.header
    if header["kind"] == "update":
        assert base is not None
        codes = np.frombuffer(frame.body, np.int8, numel)
        scales = np.frombuffer(frame.body, np.float32, offset=numel)
        weights = base + restore_pieces(Codes(codes, scales), pieces)
    else:
        weights = np.frombuffer(frame.body, np.float32).copy()
    return Answer(int(header["round"]), weights, header)


def _wire(pieces: Sequence[Piece]) -> list[list[Any]]:
    return [[piece.name, piece.start, piece.numel] for piece in pieces]
