"""A training run that something happens to: started for real, watched by its ledger, and looked over when it has ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from nodes import RayCluster
from processes import Driver, command_line

sys.path.append(str(Path(__file__).parents[1] / "jobs/train"))
from small_corpus import Corpus, as_file, as_train, fingerprint, make_corpus

from tigerbot.runs import read_json
from tigerbot_jobs.train.goodput import account
from tigerbot_jobs.train.ledger import Event, read_events
from tigerbot_jobs.train.metrics import read_rows
from tigerbot_jobs.train.recovery.keeper import SHM
from tigerbot_jobs.train.recovery.run import run_id_of

__all__ = ["INTERVAL", "STEPS", "Corpus", "Ending", "Story", "injecting", "make_corpus", "pid_of"]

STEPS = 60
INTERVAL = 2  # steps between two snapshots
_INJECTED = Path(__file__).with_name("injected")


def injecting(folder: Path) -> dict[str, str]:
    """What a process finds in its environment so that the faults of `folder` happen to it."""
    path = f"{_INJECTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    return {"PYTHONPATH": path, "TIGER_INJECT_FOLDER": str(folder)}


class Story:
    """One run of `tiger run`, on a Ray of its own, and whoever it takes to end it.

    Args:
        corpus: to train on.
        folder: everything is written there.
        tracking: where MLflow is.
        cluster: to run on, whose nodes know of INJECTING; with none, on a Ray of its own on this machine.
        scale: of the spec; two workers unless it says otherwise.
        inject: faults, see injected/sitecustomize.py.
        fields: of the spec's train section.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        tracking: str,
        *,
        cluster: RayCluster | None = None,
        scale: dict[str, Any] | None = None,
        inject: Sequence[dict[str, Any]] = (),
        tolerance: dict[str, Any] | None = None,
        deepspeed: dict[str, Any] | None = None,
        keep: int = 3,
        **fields: Any,
    ) -> None:
        loop = {"tokens": STEPS * 1024, "batch_tokens": 1024, "micro_batch": 16, "validate_every": 20}
        folder.mkdir(parents=True, exist_ok=True)
        self.raw = corpus.spec("story", folder, **loop | fields) | {
            "scale": {"workers": 2, "standbys": 0, "threads_per_worker": 1} | (scale or {}),
            "storage": {"uri": str(folder), "keep": keep},
            "tracking": {"uri": tracking},
            "fault_tolerance": {"snapshot_every_steps": INTERVAL, "checkpoint_every_steps": 20} | (tolerance or {}),
        }
        self.raw |= {"deepspeed": deepspeed} if deepspeed else {}
        self.folder, self._cluster = folder, cluster
        (folder / "inject.json").write_text(json.dumps(list(inject)))
        self._spec = as_file(self.raw, folder)
        self.drivers: list[Driver] = []
        self.start()

    def __enter__(self) -> Story:
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            driver.end()
        for started in self.events("driver_started")[:1]:  # a run that failed keeps its state for the next try
            shutil.rmtree(self._memory(started), ignore_errors=True)

    @property
    def steps(self) -> int:
        return self.raw["train"]["tokens"] // self.raw["train"]["batch_tokens"]

    def start(self, cluster: RayCluster | None = None) -> None:
        """The same command, once more; on another cluster, where one is given."""
        self._cluster = cluster or self._cluster
        command = [sys.executable, "-m", "tigerbot.cli", "run", str(self._spec)]
        if self._cluster is None:
            environment = os.environ | injecting(self.folder)
            self.drivers.append(Driver(command, self.folder / f"driver-{len(self.drivers)}.log", environment))
            return
        # Its nodes were started before: they look where this points.
        place = Path(self._cluster.environment_of_nodes["TIGER_INJECT_FOLDER"])
        place.unlink(missing_ok=True)
        place.symlink_to(self.folder)
        self.drivers.append(self._cluster.run_driver(command, cwd=self.folder))

    # While it runs.

    @property
    def driver(self) -> Driver:
        return self.drivers[-1]

    def events(self, *kinds: str) -> list[Event]:
        """What the ledger says so far."""
        path = self.folder / "story/ledger.jsonl"
        found = read_events(path) if path.exists() else []
        return [event for event in found if event.kind in kinds or not kinds]

    def wait_for(self, what: str, ready: Callable[[], Any], timeout_s: float = 120) -> Any:
        """Until `ready` is true; what it gives then."""
        until = time.monotonic() + timeout_s
        while not (found := ready()):
            assert self.driver.holder.poll() is None and not self.driver.ended, f"ended: {self.driver.output()[-3000:]}"
            assert time.monotonic() < until, f"no {what} within {timeout_s} s: {self.told()}"
            time.sleep(0.02)
        return found

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: self.furthest() >= step)

    def wait_for_generation(self, number: int) -> Event:
        """Its `generation` event."""
        return self.wait_for(f"generation {number}", lambda: self.generations()[number - 1 : number])[0]

    def wait_for_workers(self, count: int) -> None:
        """Until so many have been ready, standbys among them."""
        self.wait_for(f"{count} workers", lambda: len(self.events("worker_ready")) >= count)

    def wait_for_copies(self, count: int) -> None:
        """Until the state of so many workers lies on another node too: before, the loss of a node takes it along."""
        self.wait_for(f"{count} copies", lambda: len(self.events("copied")) >= count)

    def generations(self) -> list[Event]:
        return self.events("generation")

    def members(self) -> list[str]:
        """Workers of the last generation, by rank."""
        return [str(member) for member in self.generations()[-1].items("members")]

    def spares(self) -> list[str]:
        """Workers that are ready, live and have no rank."""
        ready = [event.text("worker") for event in self.events("worker_ready")]
        return [worker for worker in ready if worker not in self.members() and psutil.pid_exists(pid_of(worker))]

    def furthest(self) -> int:
        """Optimizer steps done at most, as far as the ledger knows."""
        return max((int(row[0]) for event in self.events("steps") for row in event.items("rows")), default=0)

    def faults(self) -> list[str]:
        return [event.text("fault") for event in self.events("fault_seen")]

    def told(self) -> str:
        """The ledger without its steps, short: for a message."""
        lines = [f"{e.t:.2f} {e.kind} {json.dumps(e.fields)[:200]}" for e in self.events() if e.kind != "steps"]
        return "\n".join(lines[-40:])

    # The end.

    def wait(self, timeout_s: float = 180) -> int:
        """The exit status."""
        code = self.driver.wait(timeout_s)
        if code:
            print(self.driver.output()[-3000:])
        return code

    def check_books(self, *, missing: Sequence[int] = ()) -> None:
        """Every second is accounted for, every step was logged."""
        found = account(self.events())
        assert abs(sum(found.seconds.values()) - found.wall_s) <= 0.005 * found.wall_s
        logged = [row["step"] for row in read_rows(self.folder / "story/metrics.jsonl")]
        assert logged == [step for step in range(1, self.steps + 1) if step not in missing]
        assert read_json(self.folder / "story/state.json", {})["status"] == "done"

    def check_nobody_is_left(self, patience_s: float = 20) -> None:
        """No process."""
        until = time.monotonic() + patience_s
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.1)
        there = [(one.pid, one.status(), command_line(one)) for one in left if one.is_running()]
        assert not there, f"after {patience_s} s there are still {there}"

    def check_nothing_is_left(self, patience_s: float = 20) -> None:
        """No process, and nothing in shared memory."""
        self.check_nobody_is_left(patience_s)
        memory = self._memory(self.events("driver_started")[0])
        if self._cluster is None:
            assert not memory.exists()
            return
        for node in self._cluster.nodes:
            command = [*self._cluster.command(node), "find", "/dev/shm", "-path", f"{memory}*"]
            found = subprocess.run(command, capture_output=True, text=True).stdout
            assert not found, f"{node}: {found}"

    def _left(self) -> list[psutil.Process]:
        ours = [process for driver in self.drivers for process in driver.processes()]
        return ours + (self._cluster.workers_named("RayTrainWorker|Keeper|TrainController") if self._cluster else [])

    def _memory(self, started: Event) -> Path:
        return SHM / f"tiger-{run_id_of(as_train(self.raw), started.text('spec_hash'))}"

    def ending(self) -> Ending:
        """The state it ended with."""
        rows = read_rows(self.folder / "story/metrics.jsonl")
        return Ending(fingerprint(self.raw, self.steps), rows[-1]["loss"], self.used())

    def used(self) -> dict[int, Counter[int]]:
        """The sequences that every step of the final history was made of: each step's last group counts."""
        groups: dict[int, dict[int, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
        for path in self.folder.glob("used-*.jsonl"):
            for line in path.read_text().splitlines():
                one = json.loads(line)
                groups[one["step"]][one["generation"]][one["rank"]] = one
        found = {}
        for step, by_generation in groups.items():
            last = by_generation[max(by_generation)]
            assert set(last) == set(range(last[min(last)]["world_size"])), f"step {step} was not done by all ranks"
            found[step] = Counter(sequence for one in last.values() for sequence in one["used"])
        return found

    def steps_lost(self) -> list[int]:
        """Of every generation but the first: how many finished steps it had to do again."""
        lost, furthest = [], 0
        for event in self.events("steps", "restored"):
            if event.kind == "steps":
                furthest = max(furthest, *(int(row[0]) for row in event.items("rows")))
            elif event.whole("generation") > 1:
                lost.append(max(0, furthest - event.whole("step")))
        return lost


@dataclass(frozen=True)
class Ending:
    """What a run came to: its state by file, its last loss, and by step the sequences it was trained on."""

    state: dict[str, str]
    loss: float
    used: dict[int, Counter[int]]


def pid_of(worker: str) -> int:
    """Of a worker's name, `<node>-<pid>`."""
    return int(worker.rpartition("-")[2])
