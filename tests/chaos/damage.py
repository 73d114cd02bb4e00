"""Random damage for soak tests: a signal to a process chosen by pattern, at a random moment; seeded, and written down."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil

Kind = Literal["kill", "freeze", "pause", "terminate"]
SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "pause": signal.SIGSTOP, "terminate": signal.SIGTERM}
Find = Callable[[], Sequence[psutil.Process]]


@dataclass(frozen=True)
class Action:
    """What can be done: `pause` is a freeze that ends after a time drawn from `pause_s`."""

    name: str
    kind: Kind
    find: Find
    weight: float = 1.0
    pause_s: tuple[float, float] = (0.5, 3.0)


@dataclass(frozen=True)
class Done:
    """One deed. `t` is wall time, `pid` 0 where nothing matched."""

    t: float
    name: str
    kind: Kind
    pid: int
    title: str
    seconds: float = 0.0


@dataclass
class Damage:
    """Does one action at a time; the choice of actions, moments and victims depends on the seed and what it finds.

    Args:
        log: every deed is appended to it as a JSON line, before it is done.
    """

    actions: Sequence[Action]
    seed: int = 0
    log: Path | None = None
    done: list[Done] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._frozen: list[psutil.Process] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def once(self) -> Done:
        """One action now."""
        action = self._random.choices(self.actions, [one.weight for one in self.actions])[0]
        chance = self._random.random()
        seconds = self._random.uniform(*action.pause_s) if action.kind == "pause" else 0.0
        found = sorted(action.find(), key=lambda process: process.pid)
        if not found:
            return self._note(Done(time.time(), action.name, action.kind, 0, "", 0.0))
        victim = found[int(chance * len(found))]
        try:
            title = " ".join(victim.cmdline())[:80]
            deed = self._note(Done(time.time(), action.name, action.kind, victim.pid, title, seconds))
            victim.send_signal(SIGNALS[action.kind])
        except psutil.NoSuchProcess:
            return self._note(Done(time.time(), action.name, action.kind, 0, "gone before", 0.0))
        if action.kind == "freeze":
            self._frozen.append(victim)
        if action.kind == "pause":
            self._frozen.append(victim)
            self._stop.wait(seconds)
            self.thaw()
        return deed

    def start(self, every_s: float, seconds: float) -> None:
        """In the background: one action at a random moment of every interval, for that long."""
        self._thread = threading.Thread(target=self._run, args=(every_s, seconds), daemon=True)
        self._thread.start()

    def stop(self) -> list[Done]:
        """End the background work, let everybody go on, and give what was done. Its failure is raised here."""
        self._stop.set()
        if self._thread:
            self._thread.join(30)
        self.thaw()
        if self._error:
            raise self._error
        return self.done

    def thaw(self) -> None:
        """SIGCONT to all that were frozen."""
        while self._frozen:
            victim = self._frozen.pop()
            if victim.is_running():
                victim.send_signal(signal.SIGCONT)

    def _run(self, every_s: float, seconds: float) -> None:
        began = time.monotonic()
        try:
            for turn in range(round(seconds / every_s)):
                moment = began + (turn + self._random.random()) * every_s
                if self._stop.wait(max(moment - time.monotonic(), 0)):
                    return
                self.once()
        except BaseException as error:
            self._error = error

    def _note(self, deed: Done) -> Done:
        self.done.append(deed)
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps(asdict(deed)) + "\n")
        return deed
