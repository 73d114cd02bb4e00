"""A training run that only pretends: ranks with noisy phases under a clock that costs nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tigerbot_jobs.train.watch.beats import Beat
from tigerbot_jobs.train.watch.hangs import Hang, HangWatch

BEAT_S = 0.25
FOREVER = 1e9


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Entry:
    """A rank enters a phase."""

    at: float
    step: int
    phase: str
    cpu: float = 1.0  # cores used in it


@dataclass
class PretendRun:
    """`ranks` workers, two a node, that do what training does: own work, then a collective all of them wait in.

    Args:
        pause: chance per rank and step that the whole process stands still for up to 4 s.
        stall: chance that reading data takes up to 4 s more.
        hang_rank, hang_step, hang_phase, silent: from then on that rank moves no more, and beats no more if `silent`.
    """

    ranks: int
    seed: int = 0
    pause: float = 0.0005
    stall: float = 0.0005
    hang_rank: int = -1
    hang_step: int = -1
    hang_phase: str = "data"
    silent: bool = False
    hung_at: float = FOREVER
    step_s: list[float] = field(default_factory=list)
    frozen: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def entries(self, start: float) -> Iterator[list[list[Entry]]]:
        """Step by step, each rank's phases."""
        chance, at, step = random.Random(self.seed), start, 0
        while True:
            begun, ready = at, []
            phases: list[list[Entry]] = [[] for _ in range(self.ranks)]
            for rank in range(self.ranks):
                ready.append(self._own_work(chance, rank, step, at, phases[rank]))
            met = max(ready) + 0.05 * chance.lognormvariate(0, 0.3)
            for rank in range(self.ranks):
                phases[rank].append(Entry(met, step, "step"))
            at = met + 0.05
            for rank in range(self.ranks):
                self._after(step, rank, at, phases[rank])
            at += 20.0 if step % 400 == 399 else 6.0 if step % 100 == 99 else 0.01
            self.step_s.append(at - begun)
            yield phases
            step += 1

    def _own_work(self, chance: random.Random, rank: int, step: int, at: float, phases: list[Entry]) -> float:
        for phase, typical in (("data", 0.02), ("forward", 0.2), ("backward", 0.3)):
            phases.append(Entry(at, step, phase))
            if (rank, step, phase) == (self.hang_rank, self.hang_step, self.hang_phase):
                self.hung_at = at
                return FOREVER
            if phase == "data" and chance.random() < self.stall:
                at += chance.uniform(0.5, 4.0)
            if phase == "forward" and chance.random() < self.pause:
                length = chance.uniform(0.5, 4.0)
                self.frozen.setdefault(rank, []).append((at, at + length))
                at += length
            at += typical * chance.lognormvariate(0, 0.5)
        return at

    def _after(self, step: int, rank: int, at: float, phases: list[Entry]) -> None:
        """Rank 0 saves now and then while the others wait; all of them evaluate, more rarely."""
        if step % 400 == 399:
            phases.append(Entry(at, step + 1, "eval"))
        elif step % 100 == 99:
            phases.append(Entry(at, step + 1, "save" if rank == 0 else "agree", cpu=0.3))


def watched(
    run: PretendRun, seconds: float, *, watch: HangWatch | None = None, clock: Clock | None = None
) -> list[tuple[float, Hang]]:
    """Every hang the watch reports while a run goes on for so long, and when."""
    clock = clock or Clock()
    watch = watch or HangWatch(clock=clock)
    start, chance = clock.now, random.Random(run.seed + 1)
    steps = run.entries(start)
    todo: list[list[Entry]] = [[] for _ in range(run.ranks)]
    current: list[Entry | None] = [None] * run.ranks
    seq, cpu = [0] * run.ranks, [0.0] * run.ranks
    offsets = [chance.uniform(0, BEAT_S) for _ in range(run.ranks)]
    watch.new_generation(1, [f"w{rank}" for rank in range(run.ranks)])
    found: list[tuple[float, Hang]] = []
    base = start
    while base - start < seconds:
        base += BEAT_S
        for rank in range(run.ranks):
            clock.now = base + offsets[rank]
            while not todo[rank] or todo[rank][-1].at <= clock.now:
                if run.hung_at < FOREVER:
                    break
                for queue, more in zip(todo, next(steps), strict=True):
                    queue.extend(more)
            while todo[rank] and todo[rank][0].at <= clock.now:
                current[rank] = todo[rank].pop(0)
                seq[rank] += 1
            entry = current[rank]
            stopped = any(begin <= clock.now < end for begin, end in run.frozen.get(rank, ())[-3:])
            if entry is None or stopped or (run.silent and rank == run.hang_rank and clock.now > run.hung_at):
                continue
            cpu[rank] += BEAT_S * entry.cpu * (clock.now <= run.hung_at)
            watch.beat(
                Beat(
                    f"w{rank}",
                    rank,
                    1,
                    entry.step,
                    entry.phase,
                    seq[rank],
                    clock.now - entry.at,
                    cpu[rank],
                    f"n{rank // 2}",
                )
            )
        clock.now = base + BEAT_S
        found += [(clock.now, hang) for hang in watch.check()]
    return found
