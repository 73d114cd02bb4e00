"""A training run to do damage to: its command, what it wrote while it went, and how it must have ended."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nodes import RayCluster
from processes import Driver

sys.path.append(str(Path(__file__).parents[1] / "jobs/train"))
from small_corpus import Corpus, as_file, as_train

from tigerbot.spec import spec_hash
from tigerbot_jobs.train.alone import train_rank
from tigerbot_jobs.train.goodput import account
from tigerbot_jobs.train.ledger import Event, read_events
from tigerbot_jobs.train.metrics import read_rows
from tigerbot_jobs.train.prepared import WorkerJob
from tigerbot_jobs.train.shard import Shard

ON_TWO = {"workers": [1, 2], "cpus_per_worker": 1, "threads_per_worker": 1}


def spec_for(
    corpus: Corpus, storage: str | Path, steps: int, *, tokens_a_step: int = 512, **more: Any
) -> dict[str, Any]:
    """A run of two workers, or one, that takes part of a second for a step."""
    raw = corpus.spec("chaos", Path("/unused"), tokens=steps * tokens_a_step, batch_tokens=tokens_a_step, micro_batch=8)
    raw["train"]["validate_every"] = 10**6
    raw |= {"scale": ON_TWO, "storage": {"uri": str(storage), "keep": 3}, "fault_tolerance": {}}
    raw["fault_tolerance"] = {"checkpoint_every_steps": 20, "snapshot_every_steps": 1}
    return raw | more


@dataclass
class Training:
    """A run by `tiger run SPEC`, on a node of a cluster, or on a cluster of its own where there is none.

    Args:
        raw: the spec.
        home: where the command runs; its spec lies there.
        tracking: where MLflow is; with none, the run starts its own.
    """

    raw: dict[str, Any]
    home: Path
    cluster: RayCluster | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    tracking: str = ""

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.raw["tracking"] = {"uri": self.tracking or f"sqlite:///{self.home}/mlflow.db"}
        self.argv = [sys.executable, "-m", "tigerbot.cli", "run", str(as_file(self.raw, self.home))]
        uri = self.raw["storage"]["uri"]
        staged = self.home / "tiger-runs/.staging" / uri.removeprefix("s3://")
        self.folder = (staged if uri.startswith("s3://") else Path(uri)) / self.raw["name"]

    def start(self, node: str = "head") -> Driver:
        assert self.cluster is not None
        self.driver = self.cluster.run_driver(self.argv, node=node, cwd=self.home, environment=self.environment)
        return self.driver

    def events(self, kind: str = "") -> list[Event]:
        path = self.folder / "ledger.jsonl"
        return [event for event in (read_events(path) if path.exists() else []) if kind in ("", event.kind)]

    def step(self) -> int:
        """The last one that the ledger knows of."""
        return max((int(row[0]) for event in self.events("steps") for row in event.items("rows")), default=0)

    def wait_for(self, what: Callable[[], Any], said: str, timeout_s: float = 120) -> Any:
        """What it gives once it gives something, while the run goes on."""
        until = time.monotonic() + timeout_s
        while not (found := what()):
            told = f"{self.driver.output()[-2000:]}\n{self.story()}"
            assert self.driver.holder.poll() is None and not self.driver._said, f"ended before {said}: {told}"
            assert time.monotonic() < until, f"not within {timeout_s:.0f} s: {said}: {told}"
            time.sleep(0.05)
        return found

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        self.wait_for(lambda: self.step() >= step, f"step {step}", timeout_s)

    def sizes(self) -> list[int]:
        """World sizes of the generations that got as far as having a state."""
        began = {event.whole("generation"): event.whole("world_size") for event in self.events("generation")}
        return [began[event.whole("generation")] for event in self.events("restored")]

    def faults(self) -> list[str]:
        return [event.text("fault") for event in self.events("fault_seen")]

    def losses(self) -> dict[int, float]:
        return {int(row["step"]): row["loss"] for row in read_rows(self.folder / "metrics.jsonl")}

    def story(self) -> str:
        """The ledger without its steps, for the message of an assertion."""
        events = [event for event in self.events() if event.kind != "steps"]
        return "\n".join(f"{event.m:.2f} {event.kind} {json.dumps(event.fields)[:300]}" for event in events[-60:])

    def assert_whole(self, steps: int) -> None:
        """It is done, every step was made, and the ledger's seconds add up."""
        found = account(self.events())
        assert found.ended == "done" and found.steps == steps, self.story()
        assert abs(sum(found.seconds.values()) - found.wall_s) <= 0.005 * found.wall_s
        assert min(found.seconds.values()) >= 0
        assert sorted(self.losses()) == list(range(1, steps + 1))


def state_in(checkpoint: Path) -> dict[tuple[str, str], str]:
    """SHA-256 of every tensor of every rank: what a checkpoint says of its own making is left out."""
    found = {}
    for path in sorted(checkpoint.glob("rank-*")):
        shard = Shard.open(path)
        found |= {(path.name, name): hashlib.sha256(shard.array(name).tobytes()).hexdigest() for name in shard.names()}
    return found


def undisturbed(
    corpus: Corpus, raw: dict[str, Any], storage: Path
) -> tuple[dict[tuple[str, str], str], dict[int, float]]:
    """State and losses of the same run on two ranks to which nothing happens: no Ray, no hub."""
    spec = as_train(raw | {"storage": {"uri": str(storage), "keep": 1}})
    folder = storage / spec.name
    folder.mkdir(parents=True)
    held_out = [corpus.folder / "tokens/held-out"]
    job = WorkerJob(spec, spec_hash(spec), str(folder), [(corpus.folder / "tokens/train", 1.0)], held_out, 1)
    mp.start_processes(_rank, (str(storage / "meeting"), job), nprocs=2, start_method="spawn")  # type: ignore[attr-defined]
    losses = {int(row["step"]): row["loss"] for row in read_rows(folder / "metrics.jsonl")}
    return state_in(max((folder / "checkpoints").glob("step-*"))), losses


def _rank(rank: int, meeting: str, job: WorkerJob) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train_rank(job, rank, 2, torch.device("cpu"))
    dist.destroy_process_group()


def left_in_memory(cluster: RayCluster, nodes: Sequence[str]) -> list[str]:
    """What runs left in the shared memory of these nodes."""
    found = []
    for node in nodes:
        command = [*cluster.command(node), "find", "/dev/shm", "-path", "*tiger-*"]
        found += subprocess.run(command, capture_output=True, text=True).stdout.split()
    return found


def nobody_left(cluster: RayCluster, timeout_s: float = 15) -> bool:
    """Whether no worker, keeper or controller is left on any node, soon."""
    until = time.monotonic() + timeout_s
    while cluster.workers_named("RayTrainWorker|Keeper|TrainController"):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
