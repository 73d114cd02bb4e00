"""The driver's side of a run: hub, workers and keepers are started, the hub decides, everything is stopped."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tigerbot import errors
from tigerbot.errors import TigerError
from tigerbot.notify import notify
from tigerbot.spec import TrainSpec
from tigerbot.storage import open_store
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.ledger import Ledger, read_events
from tigerbot_jobs.train.recovery.backend import HEALTH_CHECK_S, Workers
from tigerbot_jobs.train.recovery.ending import Verdict
from tigerbot_jobs.train.recovery.entry import train_worker
from tigerbot_jobs.train.recovery.hub import Hub
from tigerbot_jobs.train.recovery.inventory import Restored
from tigerbot_jobs.train.recovery.keeper import SHM, Keeper
from tigerbot_jobs.train.recovery.messages import Hello
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.settings import HubSettings
from tigerbot_jobs.train.recovery.standing import Staff
from tigerbot_jobs.train.watch.notices import draining_nodes
from tigerbot_jobs.train.watch.quarantine import quarantine_of

LEDGER = "ledger.jsonl"
_DRAINS_S = 2.0

Hire = Callable[[WorkerJob, int, dict[str, str]], Staff]


def workers_of(job: WorkerJob, count: int, environment: dict[str, str]) -> Staff:
    """Workers of this run alone."""
    return Workers(train_worker, job, job.spec.scale, Path(job.folder), count, environment)


class Supervised:
    """A run under the hub.

    Args:
        job: of every worker; hub, token and run id are filled in here.
        on_row: of every metrics row.
        host: that hub and keepers listen on.
        slots: workers the cluster can hold.
        environment: of the workers.
        hire: gives the workers for a job, so many, with this environment.
    """

    def __init__(
        self,
        job: WorkerJob,
        on_row: Callable[[dict[str, Any]], None],
        *,
        host: str,
        slots: int,
        environment: dict[str, str],
        hire: Hire = workers_of,
    ) -> None:
        spec = job.spec
        self._folder = Path(job.folder)
        self._ledger = Ledger(self._folder / LEDGER)
        token = secrets.token_hex(16)
        run_id = run_id_of(spec, job.hash)
        generation, history = _history(self._folder / LEDGER)
        low, high = spec.scale.bounds
        standbys = standbys_of(spec, slots)
        count = min(slots, high + standbys)
        tolerance = spec.fault_tolerance
        every = tolerance.checkpoint_every_s
        persister = Persister(
            open_store(spec.storage.uri),
            f"{spec.name}/checkpoints",
            keep=spec.storage.keep,
            every_s=None if every == "auto" else every,
            cards=high,
        )
        settings = HubSettings(low, high, count, token, max_failures=tolerance.max_failures)
        self.hub = Hub(
            settings,
            self._ledger,
            persister,
            on_row=on_row,
            on_node=self._start_keeper,
            on_fault=self._quarantined,
            on_event=self._tell,
            generation=generation,
            history=history,
        )
        self._ledger.write(
            "driver_started",
            pid=os.getpid(),
            host=os.uname().nodename,
            spec_hash=job.hash,
            name=spec.name,
            workers=[low, high],
            standbys=count - min(count, high),
            price_per_card_hour=tolerance.price_per_card_hour,
        )
        self._keepers: dict[str, Any] = {}
        self._closed = threading.Event()
        self._job = replace(job, hub=self.hub.start(host), token=token, run_id=run_id)
        self._ledger.write("scheduled")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(HEALTH_CHECK_S))
        self._workers = hire(self._job, count, environment)
        threading.Thread(target=self._watch_drains, daemon=True, name="drains").start()

    def wait(self) -> None:
        """Until the run is done.

        Raises:
            TigerError: why it is not.
        """
        verdict = None
        while verdict is None:
            verdict = self.hub.wait(0.2)
            if verdict is None and self._workers.ended:
                verdict = self.hub.wait(2.0) or Verdict("failed", _parts(self._workers.error))
        self._workers.end(5)
        if verdict.reason == "failed":
            raise _as_error(verdict.error or {})

    def leave(self) -> None:
        """Somebody wants to stop: keep the state, then go."""
        self.hub.leave()
        self.hub.wait(20)

    def drop(self) -> None:
        """Nobody will go on with this run: stop at once, and keep nothing."""
        self.hub.drop()
        self.hub.wait(20)

    def close(self) -> None:
        self._closed.set()
        self.hub.close()
        self._workers.end(5)
        self._await_keepers(5.0)
        self._ledger.close()

    def _await_keepers(self, timeout_s: float) -> None:
        """They clear shared memory last."""
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.wait(
                [served for _, served in self._keepers.values()], num_returns=len(self._keepers), timeout=timeout_s
            )

    def _quarantined(self, node: str, kind: str, evidence: str) -> bool:
        """Write a node's fault into the storage folder's history; whether the node is kept out now."""
        return quarantine_of(self._folder.parent).add(node, kind, evidence) is not None

    def _tell(self, event: str, detail: str) -> None:
        spec = self._job.spec
        if event == "note":
            print(f"  {detail}", flush=True)
            return
        threading.Thread(target=notify, args=(event, spec, detail), daemon=True, name="webhook").start()

    def _watch_drains(self) -> None:
        """With replica groups Ray's own watcher of preempted nodes is off: this is ours."""
        while not self._closed.wait(_DRAINS_S):
            with contextlib.suppress(Exception):  # Ray is shutting down
                for node, deadline_s in draining_nodes().items():
                    self.hub.node_going(node, "ray", deadline_s)

    def _start_keeper(self, hello: Hello) -> None:
        threading.Thread(target=self._keeper, args=(hello,), daemon=True, name=f"keeper-{hello.node}").start()

    def _keeper(self, hello: Hello) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(hello.ray_node, soft=False)
        actor: Any = ray.remote(Keeper)
        made = actor.options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=2).remote(
            self._job.hub, self._job.token, self._job.run_id, self._job.spec.storage.uri, hello.address, hello.ray_node
        )
        self._keepers[hello.node] = (made, made.serve.remote())


def run_id_of(spec: TrainSpec, hash: str) -> str:
    """What a run is called in shared memory: its name, what it computes, and where it is stored."""
    return hashlib.sha256(f"{spec.name}\n{hash}\n{spec.storage.uri}".encode()).hexdigest()[:16]


def standbys_of(spec: TrainSpec, slots: int) -> int:
    """Warm standbys: as the spec says; else one where more than one worker trains and a slot is free."""
    high = spec.scale.bounds[1]
    if spec.scale.standbys != "auto":
        return spec.scale.standbys
    return 1 if high > 1 and slots > high else 0


def forget_memory(spec: TrainSpec, hash: str) -> None:
    """Remove what a run left in this machine's shared memory."""
    shutil.rmtree(SHM / f"tiger-{run_id_of(spec, hash)}", ignore_errors=True)


def _history(path: Path) -> tuple[int, list[Restored]]:
    """The last generation's number, and where every generation began: from the ledger of earlier drivers."""
    events = read_events(path)
    restored = [Restored(e.whole("generation"), e.whole("step")) for e in events if e.kind == "restored"]
    return max((e.whole("generation") for e in events if e.kind == "generation"), default=0), restored


def _as_error(parts: dict[str, str]) -> TigerError:
    kind = getattr(errors, parts.get("type", ""), TigerError)
    return kind(parts.get("what", "training failed"), where=parts.get("where", ""), fix=parts.get("fix", ""))


def _parts(error: Exception | None) -> dict[str, str]:
    text = " ".join(str(error).split())[-300:] if error else "Ray Train ended before the run did"
    return {
        "type": "TigerError",
        "what": f"training failed: {text}",
        "where": "",
        "fix": "Ray's logs are in /tmp/ray/session_latest/logs/train; the same command goes on",
    }
