"""A heartbeat: where a rank is, said from a thread of its own; and what the watcher remembers of each worker."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

LOCAL = frozenset({"restore", "data", "forward", "snapshot", "save", "eval"})  # nobody is waited for in these
_CPU_WINDOW_S = 5.0
_GAPS = 256  # about a minute
_BUSY = 0.1  # of a core: the beating thread alone uses a hundredth


@dataclass(frozen=True)
class Beat:
    """One heartbeat.

    Args:
        worker: the process, one name for its whole life.
        rank: -1 for a standby.
        step: optimizer steps done.
        phase: form, restore, data, forward, backward, step, agree, snapshot, save, eval or idle.
        seq: goes up with every phase change.
        in_phase_s: since the phase began.
        cpu_s: CPU time of the process since it began.
        node: where the worker lives; may be left out where all of them share one machine.
    """

    worker: str
    rank: int
    generation: int
    step: int
    phase: str
    seq: int
    in_phase_s: float
    cpu_s: float
    node: str = ""


@dataclass
class Heard:
    """What is known of a worker from its beats, in the watcher's own time."""

    beat: Beat
    heard_at: float
    entered_at: float  # its phase
    turned_at: float  # its step
    steps: int = 0  # passed in its life
    cpu: deque[tuple[float, float]] = field(default_factory=deque)
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_GAPS))

    def widest_gap(self) -> float:
        """Seconds between two of the last beats: wide on a machine so full that even a heartbeat waits for a core."""
        return max(self.gaps, default=0.0)

    def busy(self) -> bool:
        """It used the CPU lately, while in this phase: slow rather than stuck."""
        if len(self.cpu) < 2:
            return False
        (begin, used), (end, used_by_now) = self.cpu[0], self.cpu[-1]
        return used_by_now - used > _BUSY * (end - begin)

    def note_cpu(self, now: float, cpu_s: float) -> None:
        self.cpu.append((now, cpu_s))
        while now - self.cpu[0][0] > _CPU_WINDOW_S:
            self.cpu.popleft()
