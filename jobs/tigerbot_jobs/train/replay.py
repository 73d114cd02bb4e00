"""Walks through a ledger's events and lays the run's time out, second by second: `Timeline`.

Within a life of the driver time is its monotonic clock; the wall clock only measures the gap between two lives. Every kind
of event has a method `_on_<kind>` here, a kind without one changes nothing, and events that are missing or come late bend
the result instead of breaking it. docs/goodput.md has the rules in words. This module knows nothing of money, percentiles
or pictures.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Sequence
from statistics import median

from tigerbot_jobs.train.ledger import Event, finite
from tigerbot_jobs.train.timeline import STOPPING, Fault, Incident, Life, Persisted, Timeline, Turn

_HEALS_AFTER_S = 1.0  # steps that still come this long after a fault were not reported late: the fault went away
_RECENT = 50  # turns that say what a turn usually takes


def timeline(events: Sequence[Event], until: float | None = None) -> Timeline:
    """Walk through the events; `until` is the wall clock up to which the last driver is known to live."""
    replay = Replay()
    for event in events:
        replay.take(event)
    return replay.timeline(until)


class Replay:
    """What the next event meets. Events are taken as they come, and the line so far can be had at any time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[tuple[float, float, str]] = []
        self.turns: list[Turn] = []
        self.incidents: list[Incident] = []
        self.resizes: list[Incident] = []
        self.lives: list[Life] = []
        self.history: list[Turn] = []  # by step: what the model has behind it
        self.persisted: list[Persisted] = []
        self.missing_lines = 0
        self.known: set[str] = set()
        self.open: Incident | None = None  # training is down
        self.noted: Incident | None = None  # a fault, and training goes on
        self.last = Event(0.0, 0.0, "", "", {})

    def take(self, event: Event) -> None:
        if event.kind == "ledger":
            return  # about the file, not about the run
        if event.driver != self.last.driver or not self.lives:
            if event.driver in self.known:
                return  # a driver that was replaced and does not know it yet
            self._new_life(event)
        self.now = max(self.now, self.life_start + event.m - self.begin.m)
        self.last = event
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event)

    def timeline(self, until: float | None = None) -> Timeline:
        """The line up to the last event, or to the wall clock `until`. More events may follow."""
        end = copy.copy(self)
        end.waits, end.lives = list(self.waits), list(self.lives)
        if end.lives:
            if until is not None and not end.stopped:
                end.now += max(0.0, until - end.last.t)
            end._wait_ends("other")
            end.lives[-1] = end._life()
        last = self.turns[-1].end if self.turns else None
        incidents, resizes = ([i.as_of(last) for i in each] for each in (self.incidents, self.resizes))
        return Timeline(end.waits, self.turns, incidents, resizes, end.lives, self.persisted, self.missing_lines)

    def _new_life(self, event: Event) -> None:
        if self.lives:
            self._wait_ends("other")
            self.lives[-1] = self._life()
            if self.stopped != "done":  # a run that was done and is extended later was not idle meanwhile
                gap = max(0.0, event.t - self.last.t)
                died_at, self.now = self.now, self.now + gap
                self.waits.append((died_at, self.now, "idle_after_failure"))
                if not self.stopped:
                    self._fault(Fault("driver", died_at, worker=self.last.driver), stops=True)
        self.known.add(event.driver)
        self.begin = self.about = event
        self.life_start, self.since, self.stopped = self.now, self.now, ""
        self.state = "queue"
        self.generation, self.world_size, self.formed_size, self.restored_step = 0, 0, 0, None
        self.formed_at = self.cursor = self.reported_at = self.generation_at = self.now
        self.lives.append(self._life())

    def _life(self) -> Life:
        workers = [int(finite(each) or 0) for each in self.about.items("workers")]
        price = self.about.number("price_per_card_hour", -1.0)
        return Life(
            self.begin.driver,
            self.life_start,
            self.now,
            self.begin.t,
            self.stopped,
            self.about.text("name"),
            max(workers, default=0) + self.about.whole("standbys"),
            price if price >= 0 else None,
        )

    def _wait_ends(self, category: str, state: str = "other") -> None:
        """What was going on ends now; in a stretch of training, what lies behind the last turn was `category`."""
        if self.state == "running":
            last = min(self.now, max(self.since, self.turns[-1].end if self.turns else 0.0))
            stretches = [(self.since, last, "other"), (last, self.now, category)]
        else:
            stretches = [(self.since, self.now, self.state)]
        self.waits += [stretch for stretch in stretches if stretch[1] > stretch[0]]
        self.since, self.state = self.now, state

    def _on_driver_started(self, event: Event) -> None:
        self.about = event

    def _on_scheduled(self, _event: Event) -> None:
        if self.state == "queue":
            self._wait_ends("queue", "start")

    _on_worker_ready = _on_scheduled

    def _on_generation(self, event: Event) -> None:
        reason, first = event.text("reason"), self.generation == 0
        self.generation, self.world_size = event.whole("generation"), event.whole("world_size")
        self.generation_at, self.restored_step = self.now, None
        changes = self.formed_size not in (0, self.world_size)
        state = "start" if first else "resize" if changes else "idle_after_failure"
        self._wait_ends("resize" if reason == "grow" else "idle_after_failure", state)
        if self.open is None and reason not in ("start", ""):
            if reason == "grow":
                self.open = Incident([Fault("grow", self.now)], self.now, self._key(-1), down_from=self.now)
                self.resizes.append(self.open)
            else:
                # Training went on until now: it was down since its last step.
                since = self.turns[-1].end if self.turns else self.now
                self._down(self._cause(reason), self._key(-1), since)
        if self.open is not None:
            self.open.generation_at = self.now
            self.open.formed_at = self.open.restored_at = None

    def _on_group_formed(self, event: Event) -> None:
        if event.whole("generation", self.generation) == self.generation and self.state != "running":
            self._wait_ends("other", "restore")
            self.formed_size = self.world_size
            self.formed_at = self.cursor = self.reported_at = self.now
            if self.open is not None:
                self.open.formed_at = self.now

    def _on_restored(self, event: Event) -> None:
        if event.whole("generation", self.generation) != self.generation or self.restored_step is not None:
            return  # another rank says the same
        self.restored_step = event.whole("step")
        if event.text("tier") in ("none", "") and self.state == "restore":
            self.state = "start"
        self._wait_ends("other", "running")
        self.cursor = self.reported_at = self.now
        self._undo(self.restored_step)
        if self.open is not None:
            self.open.restored_at, self.open.tier = self.now, event.text("tier")

    def _on_rollback(self, event: Event) -> None:
        if self.open is None and self.noted is None:
            self._fault(Fault("rollback", self.now), stops=False)
        self._undo(event.whole("to_step"))

    def _on_fault_seen(self, event: Event) -> None:
        kind, rank = event.text("fault"), event.whole("rank", -1)
        # The death of a standby, which has no rank, stops nobody.
        stops = kind in STOPPING and not (kind == "process" and rank < 0)
        fault = Fault(kind, self.now, event.text("worker"), rank, event.text("node"), event.text("evidence"))
        if stops:
            self._wait_ends("hang_wait", "idle_after_failure")
        self._fault(fault, stops=stops)

    def _on_decision(self, event: Event) -> None:
        action, incident = event.text("action"), self.open or self.noted
        if incident is None or action == "grow":
            return
        incident.actions.append(action)
        if incident.acted_at is None and action != "wait":
            incident.acted_at = self.now
        if action == "skip":
            self.noted = None  # that settles it: whatever comes next has another cause

    def _on_persisted(self, event: Event) -> None:
        self.persisted.append(Persisted(self.now, event.number("seconds"), event.whole("size_bytes")))

    def _on_gap(self, event: Event) -> None:
        self.missing_lines += event.whole("lines")

    def _on_stopped(self, event: Event) -> None:
        self._wait_ends("other")
        self.stopped = event.text("reason") or "failed"

    def _on_steps(self, event: Event) -> None:
        rows = [row for row in map(_row, event.items("rows")) if row is not None]
        generation = event.whole("generation", self.generation)
        current = generation == self.generation
        limit = self.now if current else self.generation_at
        last = self.turns[-1].end if self.turns else 0.0
        floor = max(last, self.formed_at if current else 0.0)
        length = sum(row[1] for row in rows)
        # Turns follow each other, and the first of these had not ended when the ones before were reported. Where the
        # clocks disagree they reach back into the restore, then they are squeezed.
        at = max(self.cursor, self.reported_at - rows[0][1]) if rows else self.cursor
        at = max(min(at, limit - length), floor)
        squeeze = min(1.0, max(0.0, limit - at) / length) if length else 1.0
        for step, total, data, snapshot, checkpoint, evaluation, tokens in rows:
            end = at + total * squeeze
            turn = Turn(
                at, end, len(self.lives), generation, event.whole("world_size"), step, total, data, snapshot, checkpoint,
                evaluation, tokens,
            )  # fmt: skip
            self._turn(turn, current)
            at = end
        if current and rows:
            self.cursor, self.reported_at = at, self.now
            if self.state in ("queue", "start", "restore", "resize"):
                self._wait_ends("other", "running")  # that it was restored did not reach the ledger

    def _turn(self, turn: Turn, current: bool) -> None:
        if current:
            self._undo(turn.step - 1)
            self._recovered(turn)
        else:  # finished, but reported so late that the next generation may have begun before it
            begun = self.restored_step is not None and turn.step > self.restored_step
            place = bisect.bisect_left(self.history, turn.step, key=lambda t: t.step)
            turn.undone = begun or (place < len(self.history) and self.history[place].step == turn.step)
        self.turns.append(turn)
        if current:
            self.history.append(turn)  # whatever was not before it is undone
        elif not turn.undone:
            bisect.insort(self.history, turn, key=lambda t: t.step)

    def _recovered(self, turn: Turn) -> None:
        """Close the incident when this turn shows that training goes on."""
        incident = self.open
        if incident is None:
            return
        if self._key() == incident.key:  # no new generation: did it go away by itself?
            spans = turn.start < incident.seen_at < turn.end and incident.faults[0].kind in ("hang", "partition")
            goes_on = turn.start >= incident.seen_at and self.now - incident.seen_at > _HEALS_AFTER_S
            if not spans and not goes_on:
                return
            if spans:
                usual = [t.computing_s for t in self.turns[-_RECENT:]]
                turn.hang_s = max(0.0, turn.computing_s - (median(usual) if usual else 0.0))
        incident.last_step_at = self.turns[-1].end if self.turns else None
        incident.first_step_start, incident.first_step_at = turn.start, turn.end
        self.open = self.noted = None
        if self.state == "idle_after_failure":
            self._wait_ends("other", "running")

    def _fault(self, fault: Fault, *, stops: bool) -> Incident:
        if self.open is not None and self.open not in self.resizes:
            self.open.faults.append(fault)
            return self.open
        incident = Incident([fault], fault.at, self._key())
        self.incidents.append(incident)
        if stops:
            self._down(incident, self._key(), fault.at)
        else:
            self.noted = incident
        return incident

    def _cause(self, reason: str) -> Incident:
        """The fault that a new generation answers to, which had stopped nobody until now."""
        standing = [i for i in self.incidents if i.down_from is None and i.faults[0].kind == reason]
        return next(reversed(standing), self.noted) or self._fault(Fault(reason, self.now), stops=False)

    def _down(self, incident: Incident, key: tuple[int, int], since: float) -> None:
        self.open, self.noted = incident, None
        incident.key, incident.down_from = key, since

    def _key(self, offset: int = 0) -> tuple[int, int]:
        return len(self.lives), self.generation + offset

    def _undo(self, to_step: int) -> None:
        incident = self.open or self.noted
        while self.history and self.history[-1].step > to_step:
            turn = self.history.pop()
            turn.undone = True
            if incident is not None:
                incident.undone.append(turn)


def _row(raw: object) -> tuple[int, float, float, float, float, float, int] | None:
    """A row as measured, its parts no longer than the whole; None for what is not a row."""
    if not isinstance(raw, list) or len(raw) < 7:
        return None
    numbers = [finite(each) or 0.0 for each in raw[:7]]
    step, total, *parts, tokens = [max(0.0, each) for each in numbers]
    scale = min(1.0, total / sum(parts)) if sum(parts) else 1.0
    data, snapshot, checkpoint, evaluation = (part * scale for part in parts)
    return int(step), total, data, snapshot, checkpoint, evaluation, int(tokens)
