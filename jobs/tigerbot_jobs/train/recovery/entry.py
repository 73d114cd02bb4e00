"""Where a worker process begins. It imports nothing heavy itself: what takes a core for seconds is done in the background.

A standby that makes ready shares its machine with ranks that train. Its imports and its rehearsal are ten seconds of a
core; as idle work they cost the others what they leave unused, and nobody waits for a standby but those who have stopped,
whose cores are free then.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeVar

from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.watch.notices import SigtermNotice

Answer = TypeVar("Answer")
GRACE_S = 30.0  # between SIGTERM and SIGKILL, as Kubernetes has it
sigterm = SigtermNotice("", grace_s=GRACE_S, replace=True)  # Ray's own handler leaves at once


def heed_sigterm() -> None:
    """What Ray Train runs in a worker's main thread, which alone may handle signals; training is in another."""
    sigterm.install()


def train_worker(job: WorkerJob) -> None:
    """What Ray Train runs on every worker."""
    in_background(_imports)
    import torch
    from ray.train.torch import get_device

    from tigerbot_jobs.train.recovery.worker import Worker

    _step_forward()
    device: Any = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    Worker(job, device).live()


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
