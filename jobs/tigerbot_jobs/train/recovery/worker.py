"""A worker's life under Ray Train: make ready once, then one generation after another until there is nothing left to do.

No error leaves it for Ray to see, except that the hub cannot be reached: a generation that breaks is left, said to the
hub, and the process, with its model and whatever it compiled, waits for the next one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tigerbot.errors import TigerError
from tigerbot.models import build
from tigerbot.spec import TrainSpec
from tigerbot.tokens import Batch
from tigerbot_jobs.train.data import BatchPlan, plan_batches
from tigerbot_jobs.train.engine import Engine, connect_ranks, precision_of, trained_module
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.loop import Outcome, RankRun
from tigerbot_jobs.train.metrics import Row
from tigerbot_jobs.train.prepared import Prepared, make_engine
from tigerbot_jobs.train.recovery.entry import in_background, sigterm
from tigerbot_jobs.train.recovery.group import Group, use_interface_of
from tigerbot_jobs.train.recovery.keeper import node_name, shm_folder
from tigerbot_jobs.train.recovery.link import HUB_GONE, Link, own_address
from tigerbot_jobs.train.recovery.messages import Form, Formed, Hello, Noticed, Out, Probed, Ready, Restored, Stop
from tigerbot_jobs.train.recovery.tier import Tier
from tigerbot_jobs.train.watch.bugs import describe, is_communication_error
from tigerbot_jobs.train.watch.guard import LossGuard

_REJOIN_S = 10.0
_NOTICE_S = 0.2
COLLECTIVE_S = 1800.0  # the last resort: the hub's watch calls a generation off long before


class Worker:
    """One process.

    Args:
        job: what every rank is given.
        device: of this process.
    """

    def __init__(self, job: WorkerJob, device: torch.device) -> None:
        self._job, self._device = job, device
        self._node = node_name()
        self._name = f"{self._node}-{os.getpid()}"
        self._address = own_address(job.hub)
        use_interface_of(self._address)
        folder = shm_folder(job.run_id, self._node)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # The keeper asks for the stacks of a process that is stuck, in whatever it is stuck.
        self._stacks = (folder / f"stacks-{os.getpid()}").open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        hello = Hello(
            job.token, "worker", self._name, self._node, socket.gethostname(), self._address, os.getpid(), _ray_node()
        )
        self._hello = hello
        self._closed = threading.Event()
        self._link = Link(job.hub, hello)

    def live(self) -> None:
        """Until the hub says stop, or is gone."""
        try:
            prepared = in_background(self._prepare)
        except Exception as error:
            self._link.send(_failed(0, 0, error, None))
            self._link.order()
            return
        self._link.send(Ready())
        threading.Thread(target=self._await_sigterm, daemon=True, name="notice").start()
        while not isinstance(order := self._next(), Stop):
            out = self._generation(prepared, order)
            self._link.flush()
            self._link.leave()
            self._link.send(out)
        self._closed.set()
        self._link.close()

    def _await_sigterm(self) -> None:
        """Whoever sends it sends SIGKILL later: until then this process trains on, or is idle once its rank is another's."""
        while not self._closed.wait(_NOTICE_S):
            if notice := sigterm.read():
                self._link.send(Noticed(notice.source, notice.deadline_s))
                return

    def close(self) -> None:
        """Nothing of this job stays in the process, for which there may be another."""
        self._closed.set()
        self._link.close()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        gc.unfreeze()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _next(self) -> Form | Stop:
        """What to do next. A hub that is only out of reach is sought again, and this process is then a spare.

        Raises:
            ClusterError: it is gone; Ray replaces whom it sees fail, and not who has ended.
        """
        while isinstance(order := self._link.order(), Stop) and order.reason == HUB_GONE:
            self._link.close()
            self._link = Link(self._job.hub, self._hello, patience_s=_REJOIN_S)
            self._link.send(Ready())
        return order

    def _prepare(self) -> Prepared:
        """Everything that takes time and needs no rank, so that a standby steps in within a fraction of a second."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has a current device of its own
        prepared = Prepared(self._job, self._device, verify=_first_worker())
        prepared.say = lambda text: self._link.say("note", text=text)
        prepared.module(fresh=True)
        prepared.peak_flops(precision_of(self._job.spec.train, self._device))
        rehearse(self._job.spec, self._device)
        # What is there now stays: the collections between generations need not look at it again.
        gc.collect()
        gc.freeze()
        return prepared

    def _generation(self, prepared: Prepared, form: Form) -> Out:
        """Take part in one generation; how it ended for this rank."""
        group, engine, run = Group(self._device), None, None
        self._link.enter(form, group.break_out)
        began = time.monotonic()
        try:
            group.form(form, self._link, self._address, COLLECTIVE_S)
            connect_ranks(form.rank, form.world_size, self._device)
            plan = plan_batches(self._job.spec, form.world_size)
            fresh = form.tier == "none" or stage_of(self._job.spec.deepspeed) == 3
            engine = make_engine(prepared, plan, fresh=fresh, on_phase=self._link.phase)
            self._link.send(Formed(form.generation, time.monotonic() - began))
            began = time.monotonic()
            tier = Tier(prepared, form, self._link, self._folder, self._name, self._node)
            guard = _guard(form)
            run = RankRun(prepared, engine, plan, tier, _Told(self._link, form.generation, tier, self._device), guard)
            self._link.send(Restored(form.generation, run.step, form.tier, time.monotonic() - began))
            outcome = run.train()
            if outcome.why == "done":
                run.finish()
            return _left(form, outcome, guard)
        except Exception as error:
            prepared_again = not is_communication_error(error)
            if prepared_again:
                prepared.forget_module()
            out = _failed(form.generation, run.step if run else form.step, error, self._link)
            return replace(out, batch=run.batch) if run and out.why == "bug" else out
        finally:
            self._close(prepared, engine)
            group.leave()

    def _close(self, prepared: Prepared, engine: Engine | None) -> None:
        if engine is None:
            return
        try:
            engine.close()
        except Exception:
            prepared.forget_module()  # its hooks may still be on the module


class _Told:
    """The hub is told."""

    def __init__(self, link: Link, generation: int, tier: Tier, device: torch.device) -> None:
        self._link, self._generation, self._tier, self._device = link, generation, tier, device

    def phase(self, phase: str, step: int) -> None:
        if self._link.over(self._generation):  # a rank alone waits in no collective that could be broken
            raise RuntimeError("Connection closed by peer: the generation is over")
        self._link.phase(phase, step)

    def step_done(self, row: list[float], own_s: float) -> None:
        self._tier.spent(row[1] - row[3] - row[5])
        self._link.step_done(row, own_s)

    def log(self, row: Row) -> None:
        self._link.log(row)

    def say(self, kind: str, **about: Any) -> None:
        self._link.say(kind, **about)

    def paused(self) -> bool:
        return self._link.paused(self._generation)

    def after_step(self) -> None:
        if self._link.probe_wanted(self._generation):
            self._link.send(Probed(self._generation, probe_s(self._device)))


def probe_s(device: torch.device) -> float:
    """Seconds of a fixed small piece of work, the best of five: how fast this machine is, whatever the batch was."""
    size = 384 if device.type == "cpu" else 2048
    matrix = torch.full((size, size), 1.0 / size, device=device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - began)
    return best


def rehearse(spec: TrainSpec, device: torch.device) -> None:
    """One step of a small model, alone: what DeepSpeed and torch do for the first time is done before it is waited for."""
    group = Group(device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/alone", rank=0, world_size=1)
        try:
            connect_ranks(0, 1, device)
            model = build("tiny", 512, spec.train.seed)
            plan = BatchPlan(sequences=1, micro=1, micro_steps=1, steps=1)
            module = trained_module(model, spec.train, device)
            engine = Engine(module, spec.train, spec.deepspeed, plan, device)
            ids = np.arange(16, dtype=np.int64)[None]
            engine.step([Batch(ids, ids, ids, np.ones_like(ids))], lr=0.0, counted_tokens=15)
            engine.close()
        finally:
            group.leave()


def stage_of(deepspeed: dict[str, Any]) -> int:
    """The ZeRO stage a spec asks for."""
    return deepspeed.get("zero_stage", deepspeed.get("zero_optimization", {}).get("stage", 2))


def _guard(form: Form) -> LossGuard:
    guard = LossGuard()
    if form.guard:
        guard.restore(form.guard, step=form.step)
    for first, last in form.skips:
        guard.skips = guard.skips.add(first, last)
    return guard


def _left(form: Form, outcome: Outcome, guard: LossGuard) -> Out:
    if outcome.why == "stop":
        error = {"type": "TigerError", "what": outcome.text, "where": f"step {outcome.step}", "fix": ""}
        return Out(form.generation, outcome.step, "stop", error=error)
    back = outcome.rollback
    return Out(
        form.generation,
        outcome.step,
        outcome.why,
        text=outcome.text,
        rollback_to=back.to if back else -1,
        skip=list(back.skip) if back and back.skip[0] >= 0 else None,
        guard=guard.state() if back else {},
    )


def _failed(generation: int, step: int, error: Exception, link: Link | None) -> Out:
    """What an exception means to the hub: a peer went away, a bug, or a mistake that no retry mends."""
    if link is not None and (is_communication_error(error) or link.over(generation)):
        return Out(generation, step, "communication", text=" ".join(str(error).split())[:500])
    parts = None
    if isinstance(error, TigerError):
        parts = {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    key, text = describe(error, step=step)
    trace = "".join(traceback.format_exception(error))[-8000:]
    return Out(
        generation, step, "bug", text=text, key=f"{key.exception}|{key.frame}|{key.step}", trace=trace, error=parts
    )


def _ray_node() -> str:
    import ray

    with contextlib.suppress(Exception):
        return ray.get_runtime_context().get_node_id()
    return ""


def _first_worker() -> bool:
    import ray.train

    with contextlib.suppress(Exception):
        return ray.train.get_context().get_world_rank() == 0
    return True
