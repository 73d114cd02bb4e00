"""The rounds of the outer server, without its sockets: who is waited for, what is counted, what is answered.

A round is open from one outer step to the next. It closes when every island that is waited for has arrived whole, or
when its deadline has passed, counted from the first arrival; whoever misses it is not waited for again until it
reports. Time comes in as a clock.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot_jobs.train.islands import outer
from tigerbot_jobs.train.islands.layout import Layout, Piece, covers
from tigerbot_jobs.train.islands.quantise import Codes, restore, with_feedback
from tigerbot_jobs.train.islands.state import OuterState, load_state, save_state

FIRST_DEADLINE_S = 60.0  # while nothing is learnt
LEAST_DEADLINE_S = 2.0
GRACE_S = 5.0  # an island without a connection is still waited for: it may only be reconnecting
_LEARNT_FROM = 8


@dataclass(frozen=True)
class Settings:
    """`deadline_s` None: learnt. `quantize`: the answers too are int8."""

    count: int
    lr: float = 0.7
    momentum: float = 0.9
    quantize: bool = True
    deadline_s: float | None = None


@dataclass
class Contribution:
    """What has come of one island's delta. `attempt` tells a new life of the island, or a later step, from an old."""

    attempt: tuple[str, int]
    delta: np.ndarray
    pieces: list[Piece] = field(default_factory=list)
    whole: bool = False
    finite: bool = True


@dataclass(frozen=True)
class Closed:
    """A round that has closed, for the log."""

    round: int
    counted: list[int]
    missed: list[int]
    refused: list[int]
    seconds: float
    waited_s: float


class Rounds:
    """Args:
    folder: keeps the state.
    """

    def __init__(self, settings: Settings, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._folder, self._clock = settings, folder, clock
        self.state: OuterState | None = load_state(folder)
        self._seeds: dict[str, tuple[Layout, np.ndarray, list[Piece]]] = {}
        self._arrived: dict[int, Contribution] = {}
        self._update: Codes | None = None
        self._opened, self._first_at = clock(), None
        self._durations: deque[float] = deque(self.state.durations if self.state else (), maxlen=_LEARNT_FROM)
        self._connections: dict[int, int] = {}
        self._gone_at: dict[int, float] = {}
        kept = self.state.islands if self.state else {}
        # After a restart nobody is connected yet: they may be in the middle of their steps, and are waited for.
        self._expected = {island for island, record in kept.items() if not record.done}

    @property
    def round(self) -> int:
        return self.state.round if self.state else 0

    @property
    def deadline_s(self) -> float:
        """From the first arrival: an island may be as slow as to need twice the first one's time."""
        if self.settings.deadline_s is not None:
            return self.settings.deadline_s
        return max(LEAST_DEADLINE_S, statistics.median(self._durations)) if self._durations else FIRST_DEADLINE_S

    @property
    def present(self) -> int:
        """Islands that are connected, or done."""
        done = {island for island, record in self.state.islands.items() if record.done} if self.state else set()
        return len(done | {island for island, count in self._connections.items() if count})

    @property
    def all_done(self) -> bool:
        records = self.state.islands.values() if self.state else ()
        return sum(record.done for record in records) == self.settings.count

    def connected(self, island: int, change: int) -> None:
        """A connection of an island came (1) or went (-1)."""
        self._connections[island] = self._connections.get(island, 0) + change
        if self._connections[island]:
            self._gone_at.pop(island, None)
        else:
            self._gone_at[island] = self._clock()

    def check_model(self, sizes: Mapping[str, int]) -> None:
        """Raises: ValueError: the server has another model."""
        if self.state is None or self.state.layout.sizes == dict(sizes):
            return
        ours = self.state.layout.sizes
        name = next(name for name in sorted({*ours, *sizes}) if ours.get(name) != sizes.get(name))
        raise ValueError(f"another model: {name} has {sizes.get(name)} values here, {ours.get(name)} at the server")

    def seed(self, incarnation: str, sizes: Mapping[str, int], pieces: Sequence[Piece], values: np.ndarray) -> None:
        """First weights, from a rank of some island; the first island that is whole gives everybody's."""
        if self.state is not None:
            return
        if incarnation not in self._seeds:
            layout = Layout(sizes)
            self._seeds[incarnation] = (layout, np.zeros(layout.size, np.float32), [])
        layout, vector, have = self._seeds[incarnation]
        layout.scatter(vector, pieces, values)
        have += [piece for piece in pieces if piece not in have]
        if covers(layout.sizes, have):
            self.state = OuterState.fresh(layout, vector)
            self._seeds.clear()
            save_state(self.state, self._folder)
            self.begin()

    def begin(self) -> None:
        """The round's time counts from now."""
        self._opened = self._clock()

    def report(self, island: int) -> None:
        """It is there: it is waited for."""
        assert self.state is not None
        self.state.island(island).done = False
        self._expected.add(island)

    def deliver(
        self, island: int, attempt: tuple[str, int], round: int, pieces: Sequence[Piece], values: np.ndarray
    ) -> str:
        """A rank's part of its island's delta: `taken`, `over` (its round is) or `unknown` (the server has lost it).

        Raises:
            ValueError: a piece that the model does not have.
        """
        if self.state is None or round > self.state.round:
            return "unknown"
        layout = self.state.layout
        places = [layout.place(piece) for piece in pieces]
        self.report(island)
        if round < self.state.round:
            return "over"
        found = self._arrived.get(island)
        if found is None or found.attempt != attempt:
            found = self._arrived[island] = Contribution(attempt, np.zeros(layout.size, np.float32))
        if not found.whole:
            assert len(places) == len(pieces)
            layout.scatter(found.delta, pieces, values)
            found.finite &= bool(np.isfinite(values).all())
            found.pieces += [piece for piece in pieces if piece not in found.pieces]
            found.whole = covers(layout.sizes, found.pieces)
            if found.whole and self._first_at is None:
                self._first_at = self._clock()
                self._durations.append(self._first_at - self._opened)
        return "taken"

    def closes_in(self) -> float | None:
        """Seconds until the round closes if nothing more comes; 0: now; None: nobody has arrived yet."""
        if self._first_at is None or not any(part.whole for part in self._arrived.values()):
            return None
        now = self._clock()
        waits = [0.0]
        for island in self._expected:
            if island in self._arrived and self._arrived[island].whole:
                continue
            gone = self._gone_at.get(island)
            left = self._first_at + self.deadline_s - now
            waits.append(left if gone is None else min(left, gone + GRACE_S - now))
        return max(waits)

    def close(self) -> Closed:
        """The outer step; on disk when this returns."""
        state, now = self.state, self._clock()
        assert state is not None and self._first_at is not None
        whole = {island: part for island, part in sorted(self._arrived.items()) if part.whole}
        counted = [island for island, part in whole.items() if part.finite]
        if counted:
            gradient = outer.mean([whole[island].delta for island in counted])
            added = outer.change(gradient, state.momentum, lr=self.settings.lr, mu=self.settings.momentum)
            if self.settings.quantize:
                # Every island adds the same rounded change to the same weights, and so does the server.
                self._update, state.carried = with_feedback(added, state.carried)
                added = restore(self._update)
            state.params += added
        for island in counted:
            record = state.island(island)
            record.counted_round, record.counted_step = state.round, whole[island].attempt[1]
        closed = Closed(
            state.round,
            counted,
            sorted(self._expected - set(whole)),
            sorted(set(whole) - set(counted)),
            now - self._opened,
            now - self._first_at,
        )
        if not counted:
            self._update = None
        state.round += 1
        state.durations = list(self._durations)
        self._expected = set(whole)
        self._arrived.clear()
        self._opened, self._first_at = now, None
        save_state(state, self._folder)
        return closed

    def answer(
        self, island: int, pieces: Sequence[Piece], sent: tuple[int, int] | None
    ) -> tuple[dict[str, Any], bytes]:
        """(header, body) for a rank that sent a delta, of a round and at a step, or that joins (None).

        The body is the change of the round that closed, where the rank has the weights before it, or the weights.
        """
        state = self.state
        assert state is not None
        record = state.island(island)
        header: dict[str, Any] = {"round": state.round, "patience_s": self.deadline_s + GRACE_S}
        header |= {"passed": self._passed(), "counted_step": record.counted_step, "began_step": record.began_step}
        header |= {"adopted_round": record.adopted_round, "adopted_step": record.adopted_step}
        header["counted"] = sent == (record.counted_round, record.counted_step)
        if sent is not None and sent[0] == state.round - 1 and self._update is not None:
            codes = state.layout.gather_codes(self._update, pieces)
            return header | {"kind": "update"}, codes.codes.tobytes() + codes.scales.tobytes()
        return header | {"kind": "weights"}, state.layout.gather(state.params, pieces).tobytes()

    def adopted(self, island: int, round: int, step: int, began_step: int, dropped_steps: int) -> None:
        """An island says that all its ranks have taken a round's weights after `step` steps.

        What it trains for that round began at `began_step`: earlier, where a delta travels while it trains on.
        """
        if self.state is not None:
            record = self.state.island(island)
            record.adopted_round, record.adopted_step, record.began_step = round, step, began_step
            record.dropped_steps += dropped_steps

    def leave(self, island: int) -> None:
        """An island has made all its steps."""
        if self.state is not None:
            self.state.island(island).done = True
            self._expected.discard(island)
            save_state(self.state, self._folder)

    def _passed(self) -> float:
        """The part of the open round that has passed: a newcomer makes so many steps fewer, and arrives in time."""
        if not self._durations:
            return 0.0
        usual = statistics.median(self._durations)
        return float(min(1.0, (self._clock() - self._opened) / usual)) if usual > 0 else 0.0
