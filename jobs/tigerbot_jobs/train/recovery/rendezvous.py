"""Who trains: generations of members, spares beside them, and when the next generation may begin.

A pure state machine that the hub drives: no clock of its own, no sockets. A generation runs until a member is lost,
leaves or is called out; the next one begins when every living member is out, with the survivors in their old places and
spares in the places of the lost. Whatever says something in the name of an older generation is not listened to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """GATHERING: nobody trains, members are being found. RUNNING: a generation trains. ENDING: it is called off."""

    GATHERING = "gathering"
    RUNNING = "running"
    ENDING = "ending"


@dataclass(frozen=True)
class Generation:
    """`members[r]` is the worker at rank r."""

    number: int
    members: tuple[str, ...]

    @property
    def world_size(self) -> int:
        return len(self.members)


class Rendezvous:
    """Members and spares of one run.

    Args:
        low: fewest workers that may train.
        high: most that may.
        generation: the last one of an earlier driver's life; numbers never come twice.
    """

    def __init__(self, low: int, high: int, generation: int = 0) -> None:
        self._low, self._high = low, high
        self.phase = Phase.GATHERING
        self.current = Generation(generation, ())
        self._spares: list[str] = []  # ready, in the order they came
        self._out: set[str] = set()  # members of the current generation that have left it
        self._barred: set[str] = set()

    @property
    def spares(self) -> tuple[str, ...]:
        """Workers that are ready and hold no rank."""
        return tuple(worker for worker in self._spares if worker not in self._barred)

    def is_member(self, worker: str, generation: int) -> bool:
        """Whether a worker may speak for a generation: the fence."""
        return generation == self.current.number and worker in self.current.members

    def ready(self, worker: str) -> None:
        """A worker can take a rank."""
        if worker not in self._spares and worker not in self.current.members:
            self._spares.append(worker)

    def bar(self, worker: str) -> None:
        """Give this worker no rank any more (its node is quarantined, or about to go)."""
        self._barred.add(worker)

    def is_barred(self, worker: str) -> bool:
        return worker in self._barred

    def lost(self, worker: str) -> bool:
        """A worker is gone; True when that ends the generation."""
        self._spares = [spare for spare in self._spares if spare != worker]
        if worker not in self.current.members:
            return False
        self.current = Generation(self.current.number, tuple(m if m != worker else "" for m in self.current.members))
        self._out.discard(worker)
        if self.phase is Phase.RUNNING:
            self.phase = Phase.ENDING
            return True
        return False

    def end(self) -> None:
        """Call the generation off; its members will come out."""
        if self.phase is Phase.RUNNING:
            self.phase = Phase.ENDING

    def out(self, worker: str) -> None:
        """A member has left the generation and waits."""
        if worker in self.current.members:
            self._out.add(worker)

    @property
    def awaited(self) -> tuple[str, ...]:
        """Living members that have not come out of an ended generation."""
        if self.phase is not Phase.ENDING:
            return ()
        return tuple(worker for worker in self.current.members if worker and worker not in self._out)

    @property
    def wants_to_grow(self) -> bool:
        """Whether a pause would make the generation larger."""
        return self.phase is Phase.RUNNING and self.current.world_size < self._high and bool(self.spares)

    def next_generation(self, *, wait_for: int = 0) -> Generation | None:
        """The next generation, if it can begin: at any size allowed, but not below `wait_for`.

        Survivors keep their ranks where the size allows it, spares fill the gaps.
        """
        if self.phase is Phase.RUNNING or self.awaited:
            return None
        survivors = [m if m and m not in self._barred else "" for m in self.current.members]
        living = [m for m in survivors if m]
        size = min(self._high, len(living) + len(self.spares))
        if size < max(self._low, min(wait_for, self._high)):
            return None
        places = survivors[:size] + [""] * (size - len(survivors))
        waiting = [*(m for m in survivors[size:] if m), *self.spares]
        for rank, member in enumerate(places):
            if not member:
                places[rank] = waiting.pop(0)
        left_over = [m for m in living if m not in places]
        self._spares = [*left_over, *(s for s in self._spares if s not in places)]
        self._out = set()
        self.phase = Phase.RUNNING
        self.current = Generation(self.current.number + 1, tuple(places))
        return self.current
