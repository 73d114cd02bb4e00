"""What went wrong and what was decided: into the ledger, against the budgets, and to whoever wants to hear.

A fault is counted and judged here: whether it is a bug that comes back, whether anything gets further, whether the
run's own limit is reached. It decides nothing about ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tigerbot_jobs.train.ledger import Ledger
from tigerbot_jobs.train.watch.bugs import BugKey, BugMemory, Judgement

Event = Callable[[str, str], None]  # what happened (rollback, note), and a sentence


class Books:
    """The ledger of one run, and its faults.

    Args:
        max_failures: faults until the run stops; -1: as many as there are, while there is progress.
        on_event: of what a person may want to hear; must not block.
    """

    def __init__(self, ledger: Ledger, max_failures: int, on_event: Event) -> None:
        self._ledger, self._max_failures, self._on_event = ledger, max_failures, on_event
        self._bugs = BugMemory()
        self._since_fault = self._furthest = 0
        self.faults = 0
        self.step = 0  # optimizer steps done in the history as it is
        self.faulty_generation = -1

    def log(self, kind: str, **about: Any) -> None:
        self._ledger.write(kind, **about)

    def decide(self, action: str, reason: str) -> None:
        left = None if self._max_failures < 0 else self._max_failures - self.faults
        self.log("decision", action=action, reason=reason, budget_left=left)

    def tell(self, event: str, detail: str) -> None:
        self._on_event(event, detail)

    def steps(self, generation: int, world_size: int, rows: list[list[float]]) -> None:
        """Steps that were done, as the ledger keeps them."""
        self.step = int(rows[-1][0])
        # New ones only: between a state and a bug there may be steps that are done again each time.
        self._since_fault += sum(row[0] > self._furthest for row in rows)
        self._furthest = max(self._furthest, self.step)
        self.log("steps", generation=generation, world_size=world_size, rows=rows)

    def fault(self, fault: str, generation: int, *, worker: str, rank: int, node: str, evidence: str) -> str:
        """Count a fault; why the run is to stop, where that was one too many."""
        self.faults += 1
        self.faulty_generation = generation
        self.log("fault_seen", fault=fault, worker=worker, rank=rank, node=node, step=self.step, evidence=evidence)
        if 0 <= self._max_failures < self.faults:
            limit = f"fault_tolerance.max_failures is {self._max_failures}"
            return f"training failed {self.faults} times, {limit} (last: {evidence})"
        return ""

    def judge(self, key: BugKey | None, line: str, batch: int = -1) -> Judgement:
        """What a fault that ended a generation means: go on, leave a batch out, or stop."""
        if key is not None:
            # A rank may fail before the rows of the steps it had done arrive: late, they are no progress since.
            self._furthest = max(self._furthest, key.step)
        judged = self._bugs.failed(
            key,
            batch=batch if batch >= 0 else None,
            steps_since=self._since_fault,
            furthest=self._furthest,
            line=line,
        )
        self._since_fault = 0
        return judged
