"""Where a worker process begins. It imports nothing heavy itself: what takes a core for seconds is done in the background.

A standby that makes ready shares its machine with ranks that train. Its imports and its rehearsal are ten seconds of a
core; as idle work they cost the others what they leave unused, and nobody waits for a standby but those who have stopped,
whose cores are free then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from tigerbot_jobs.train.given import WorkerJob, job_from
from tigerbot_jobs.train.recovery.link import own_address
from tigerbot_jobs.train.recovery.messages import Back, Hello, Take
from tigerbot_jobs.train.recovery.wire import decode, encode
from tigerbot_jobs.train.watch.notices import SigtermNotice

Answer = TypeVar("Answer")
_HELLO_S = 10.0
GRACE_S = 30.0  # between SIGTERM and SIGKILL, as Kubernetes has it
sigterm = SigtermNotice("", grace_s=GRACE_S, replace=True)  # Ray's own handler leaves at once


def heed_sigterm() -> None:
    """What Ray Train runs in a worker's main thread, which alone may handle signals; training is in another."""
    sigterm.install()


@dataclass(frozen=True)
class Place:
    """Where a worker of a standing group asks for jobs."""

    address: str
    token: str


def train_worker(job: WorkerJob) -> None:
    """What Ray Train runs on every worker of a run."""
    device = _made_ready()
    from tigerbot_jobs.train.recovery.worker import Worker

    Worker(job, device).live()


def stand(place: Place) -> None:
    """What Ray Train runs on every worker of a standing group: one job after another, until nobody has any more."""
    device = _made_ready()
    host, _, port = place.address.rpartition(":")
    name = f"{socket.gethostname()}-{os.getpid()}"
    hello = Hello(place.token, "standing", name, "", socket.gethostname(), own_address(place.address), os.getpid())
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=_HELLO_S) as line:
        line.settimeout(None)
        line.sendall(encode(hello))
        for text in line.makefile("rb"):
            if isinstance(message := decode(text), Take):
                _take_up(job_from(message.job), device)
                line.sendall(encode(Back()))


def _take_up(job: WorkerJob, device: Any) -> None:
    from tigerbot_jobs.train.recovery.worker import Worker

    try:
        worker = Worker(job, device)
    except OSError:
        return  # its hub is gone already: the run was over before this process had come
    try:
        worker.live()
    finally:
        worker.close()


def _made_ready() -> Any:
    """This process's device, once everything is imported."""
    in_background(_imports)
    import torch
    from ray.train.torch import get_device

    _step_forward()
    device: Any = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def in_background(work: Callable[[], Answer]) -> Answer:
    """What it answers, from a thread that runs where a core is idle: from another, since only root may undo that.

    A low priority is not enough: Ray's workers, the training ones too, have priority 15 of 19.
    """
    with ThreadPoolExecutor(1, "background", initializer=_step_back) as background:
        return background.submit(work).result()


def _imports() -> None:
    for name in ("ray.train.torch", "deepspeed", "tigerbot_jobs.train.recovery.worker"):
        import_module(name)


def _step_forward() -> None:
    """Ray gives all its workers priority 15: a process that only starts would weigh as much as those who train."""
    with contextlib.suppress(OSError):  # only root may
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _step_back() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
