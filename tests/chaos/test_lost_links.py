"""Two nodes under a real hub with real keepers, without Ray or a model: one node's line to everybody breaks, and heals."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from relay import Relay

from tigerbot.spec import parse_spec
from tigerbot.storage import open_store
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.ledger import Event, Ledger, read_events
from tigerbot_jobs.train.memory import SnapshotBuffer
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery import worker
from tigerbot_jobs.train.recovery.hub import Hub
from tigerbot_jobs.train.recovery.keeper import SHM, Keeper
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.settings import HubSettings
from tigerbot_jobs.train.shard import ShardMeta, Slice

SILENCE_S = 1.5
SLICES = (Slice("w", (8,), 0, 8, 0, 0),)


class Pretender(worker.Worker):
    """A worker whose step is a meeting with the others and a snapshot."""

    def __init__(self, cluster: Cluster, job: WorkerJob) -> None:
        self._cluster = cluster
        super().__init__(job, torch.device("cpu"))
        self.forms: list[say.Form] = []
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def _live(self) -> None:
        try:
            self.live()
        finally:
            self._stacks.close()

    def _prepare(self) -> Any:
        return None

    def _generation(self, prepared: Any, form: say.Form) -> say.Out:
        self.forms.append(form)
        group = self._cluster.barriers.setdefault(form.generation, threading.Barrier(form.world_size))
        self._link.enter(form, group.abort)
        self._link.send(say.Formed(form.generation, 0.0))
        self._link.send(say.Restored(form.generation, form.step, form.tier, 0.0))
        meta = ShardMeta(form.step, form.rank, form.world_size, 2, form.generation, SLICES)
        path = self._folder / f"worker-{self._name}.{form.generation}"
        state = {"0.master": torch.zeros(8)}
        buffer, step = SnapshotBuffer.create(path, meta, state), form.step
        while True:
            try:
                self._link.phase("agree", step)
                while self._node == "far" and not self._cluster.up.wait(0.05) and not group.broken:
                    pass
                group.wait()
            except threading.BrokenBarrierError:
                return say.Out(form.generation, step, "communication", text="Connection closed by peer")
            if self._link.paused(form.generation):
                return say.Out(form.generation, step, "pause")
            step += 1
            self._link.phase("snapshot", step)
            buffer.write(state, step=step, generation=form.generation, extra={})
            self._link.step_done([step, 0.2, 0, 0, 0, 0, 1], 0.1)
            time.sleep(0.2)


class Harmless(Keeper):
    """Here all workers are this process."""

    def _kill(self, order: say.Kill) -> None:
        self._link.send(say.Killed(order.request, ""))


class Cluster:
    """Nodes "near" and "far", the far one behind a relay."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_id = folder, f"test-{secrets.token_hex(4)}"
        self.up = threading.Event()  # the line between the nodes
        self.up.set()
        self.barriers: dict[int, threading.Barrier] = {}
        self.keepers: list[Keeper] = []
        self.persister = Persister(open_store(str(folder)), "run/checkpoints", keep=3, every_s=1e9, cards=2)
        self.ledger = Ledger(folder / "ledger.jsonl")
        settings = HubSettings(1, 2, 2, "secret", silence_s=SILENCE_S)
        self.hub = Hub(settings, self.ledger, self.persister, on_row=lambda row: None, on_node=self._keep)
        self.address = self.hub.start("127.0.0.1")
        host, _, port = self.address.rpartition(":")
        self.line = Relay(host, int(port))
        raw = {"kind": "train", "name": "run", "model": {"preset": "tiny"}, "data": {"train": [{"path": "x"}]}}
        self.spec: Any = parse_spec(raw | {"train": {"tokens": 1}})
        self.near, self.far = self._worker("near"), self._worker("far")

    def cut(self) -> None:
        self.up.clear()
        self.line.stall()

    def heal(self) -> None:
        self.line.go_on()
        self.up.set()

    def close(self) -> None:
        self.heal()
        self.hub.close()
        for one in (self.near, self.far):
            one.thread.join(20)
        self.line.close()
        self.ledger.close()
        shutil.rmtree(SHM / f"tiger-{self.run_id}", ignore_errors=True)

    def way(self, node: str) -> str:
        return self.address if node == "near" else f"{self.line.host}:{self.line.port}"

    def _worker(self, node: str) -> Pretender:
        os.environ["TIGER_NODE"] = node
        return Pretender(
            self, WorkerJob(self.spec, "", "", [], [], 1, hub=self.way(node), token="secret", run_id=self.run_id)
        )

    def _keep(self, hello: say.Hello) -> None:
        threading.Thread(target=self._keeper, args=(hello.node,), daemon=True).start()

    def _keeper(self, node: str) -> None:
        os.environ["TIGER_NODE"] = node
        keeper = Harmless(self.way(node), "secret", self.run_id, str(self.folder), "127.0.0.1", "")
        self.keepers.append(keeper)
        keeper.serve()

    def events(self, kind: str) -> list[Event]:
        return [event for event in read_events(self.ledger.path) if event.kind == kind]

    def wait_for(self, ready: Callable[[], Any], timeout_s: float = 30) -> Any:
        until = time.monotonic() + timeout_s
        while not (found := ready()):
            told = "\n".join(
                f"{e.m:.2f} {e.kind} {e.fields}" for e in read_events(self.ledger.path) if e.kind != "steps"
            )
            assert time.monotonic() < until, told[-4000:]
            time.sleep(0.05)
        return found

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.hub.step >= step and self.mirrored())

    def mirrored(self) -> list[Path]:
        """The far worker's snapshots on the near node."""
        return list((SHM / f"tiger-{self.run_id}" / "near").glob("mirror-worker-far*"))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("TIGER_NODE", "near")
    monkeypatch.setattr(worker, "_ray_node", lambda: "")
    made = Cluster(tmp_path)
    yield made
    made.close()


def test_a_node_that_falls_silent_is_named_once_and_its_state_comes_from_the_copy_on_its_peer(cluster: Cluster) -> None:
    cluster.wait_for_step(12)
    reached = cluster.hub.step

    cluster.cut()
    began = time.monotonic()
    form = cluster.wait_for(lambda: cluster.near.forms[1:])[0]
    took_s = time.monotonic() - began
    steps = form.step
    cluster.wait_for(lambda: cluster.hub.step > steps + 2)

    assert [fault.text("fault") for fault in cluster.events("fault_seen")] == ["node"]
    assert form.tier == "memory" and form.step >= reached and form.world_size == 1
    assert len(form.shards) == 2 and {shard.node for shard in form.shards} == {"near"}
    assert took_s < SILENCE_S + 4
    assert [decision.text("action") for decision in cluster.events("decision")] == ["kill", "shrink"]


def test_a_line_that_heals_after_its_node_was_given_up_brings_the_same_process_back_and_the_run_grows(
    cluster: Cluster,
) -> None:
    cluster.wait_for_step(12)

    cluster.cut()
    cluster.wait_for(lambda: cluster.near.forms[1:])
    cluster.heal()
    grown = cluster.wait_for(lambda: cluster.near.forms[2:])[0]
    cluster.wait_for(lambda: cluster.hub.step > grown.step + 2)

    assert grown.world_size == 2 and grown.tier == "memory"
    assert cluster.far.forms[-1].generation == grown.generation and cluster.far.thread.is_alive()
    assert [fault.text("fault") for fault in cluster.events("fault_seen")] == ["node"]
    assert len(cluster.keepers) == 3  # the node that came back has one again


def test_a_short_silence_is_waited_out(cluster: Cluster) -> None:
    cluster.wait_for_step(12)

    cluster.cut()
    time.sleep(SILENCE_S / 2)
    cluster.heal()
    reached = cluster.hub.step
    cluster.wait_for(lambda: cluster.hub.step > reached + 5)

    assert not cluster.events("fault_seen") and len(cluster.near.forms) == 1


def test_a_line_that_is_reset_costs_one_generation_and_no_process(cluster: Cluster) -> None:
    cluster.wait_for_step(12)

    cluster.line.cut()
    grown = cluster.wait_for(lambda: [form for form in cluster.far.forms[1:] if form.world_size == 2])[-1]
    cluster.wait_for(lambda: cluster.hub.step > grown.step + 2)

    assert [fault.text("fault") for fault in cluster.events("fault_seen")] == ["process"]
    assert cluster.far.thread.is_alive() and cluster.near.thread.is_alive()
