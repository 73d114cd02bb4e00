"""Ledgers as stories: a driver with clocks that a test moves by hand, written through the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tigerbot_jobs.train.goodput import Account, account
from tigerbot_jobs.train.ledger import Clock, Ledger, read_events


class Story:
    """A run whose time passes only in `wait` and `steps`. Each life of the driver has a monotonic clock of its own."""

    def __init__(self, folder: Path, *, workers: int = 2, standbys: int = 1, price: float | None = 3.0) -> None:
        self.path = folder / "ledger.jsonl"
        self.workers, self.standbys, self.price = workers, standbys, price
        self.wall, self.monotonic = 1_700_000_000.0, 50.0
        self.lives = 0
        self.step, self.generation, self.world_size = 0, 0, workers
        self.ledger: Ledger | None = None

    def write(self, kind: str, **fields: Any) -> Story:
        assert self.ledger is not None
        self.ledger.write(kind, **fields)
        return self

    def wait(self, seconds: float) -> Story:
        self.wall += seconds
        self.monotonic += seconds
        return self

    def driver(self) -> Story:
        """A driver comes; it may be on another host, whose monotonic clock says something else."""
        self.close()
        self.lives += 1
        self.monotonic = 1000.0 * self.lives
        clock = Clock(wall=lambda: self.wall, monotonic=lambda: self.monotonic)
        self.ledger = Ledger(self.path, clock=clock, driver=f"{self.lives:08x}")
        about = {"name": "pretrain", "workers": [1, self.workers], "standbys": self.standbys}
        return self.write(
            "driver_started", pid=1, host="a", spec_hash="0" * 16, price_per_card_hour=self.price, **about
        )

    def ready(self, *, queue: float = 4.0, start: float = 6.0, tier: str = "none", restore: float = 2.0) -> Story:
        """Up to the first step: 12 s unless told otherwise."""
        self.driver().wait(queue).write("scheduled").wait(start - 1)
        for worker in range(self.world_size):
            self.write("worker_ready", worker=f"w{worker}", host="a", node=f"n{worker}", pid=worker)
        return self.group("start", form=1.0, restore=restore, tier=tier)

    def group(
        self, reason: str, *, form: float = 0.5, restore: float = 0.25, tier: str = "memory", size: int | None = None
    ) -> Story:
        """A generation, its process group, and state in it at `self.step`."""
        self.generation += 1
        self.world_size = self.world_size if size is None else size
        members = [f"w{rank}" for rank in range(self.world_size)]
        self.write("generation", generation=self.generation, world_size=self.world_size, members=members, reason=reason)
        self.wait(form).write("group_formed", generation=self.generation, seconds=form)
        self.wait(restore)
        return self.write("restored", generation=self.generation, step=self.step, tier=tier, seconds=restore)

    def steps(
        self,
        count: int,
        *,
        each: float = 1.0,
        data: float = 0.0,
        snapshot: float = 0.0,
        checkpoint: float = 0.0,
        evaluation: float = 0.0,
        tokens: int = 100,
    ) -> Story:
        """Turns of the loop, each reported when it ends."""
        for _ in range(count):
            self.step += 1
            self.wait(each)
            row = [self.step, each, data, snapshot, checkpoint, evaluation, tokens]
            self.write("steps", generation=self.generation, world_size=self.world_size, rows=[row])
        return self

    def fault(self, kind: str, *, rank: int = 1, evidence: str = "") -> Story:
        return self.write(
            "fault_seen", fault=kind, worker=f"w{rank}", rank=rank, node="n1", step=self.step, evidence=evidence
        )

    def decide(self, action: str) -> Story:
        return self.write("decision", action=action, reason="", budget_left=3)

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = None

    def account(self, until: float | None = None) -> Account:
        self.close()
        return account(read_events(self.path), until)
