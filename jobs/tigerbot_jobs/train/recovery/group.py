"""A process group that can be left and formed again inside a living process. gloo and NCCL, with DeepSpeed on top.

A rank in a gloo collective waits for its sockets: shutting them down from another thread is what ends the wait at once
(`ProcessGroupGloo.abort` does not, torch 2.13). NCCL has an abort of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from tigerbot_jobs.train.recovery.link import Link
from tigerbot_jobs.train.recovery.messages import Form, Meet
from tigerbot_jobs.train.zero_state import forget_ranks

MEET_S = 60.0


class Group:
    """The process group of one generation. `break_out` may be called from any thread, at any time, more than once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _open_sockets()
        self._store: TCPStore | None = None
        self._lock = threading.Lock()
        self._broken = False

    def form(self, form: Form, link: Link, address: str, timeout_s: float) -> None:
        """Meet the others and make the group.

        Raises:
            RuntimeError: a member was lost meanwhile, or did not come in time.
        """
        wait = timedelta(seconds=MEET_S)
        if form.rank == 0:
            self._store = TCPStore(address, 0, form.world_size, is_master=True, timeout=wait, wait_for_workers=False)
            link.send(Meet(form.generation, f"{address}:{self._store.port}"))
        else:
            host, _, port = link.meet(form.generation, MEET_S).rpartition(":")
            self._store = TCPStore(
                host, int(port), form.world_size, is_master=False, timeout=wait, wait_for_workers=False
            )
        on_gpu = self._device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=self._store,
            rank=form.rank,
            world_size=form.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        if self._broken:
            raise RuntimeError("Connection closed by peer: the generation was called off while it formed")

    def break_out(self) -> None:
        """End every collective that this process waits in."""
        with self._lock:
            self._broken = True
            if self._device.type == "cuda" and dist.is_initialized():
                with contextlib.suppress(Exception):
                    dist.distributed_c10d._abort_process_group()
            for fd, name in _open_sockets() - self._before:
                _shut(fd, name)

    def leave(self) -> None:
        """Give the group up, and what DeepSpeed remembers of it."""
        with self._lock, contextlib.suppress(Exception):
            if dist.is_initialized():
                dist.destroy_process_group()
        self._store = None
        forget_ranks()
        gc.collect()


def use_interface_of(address: str) -> None:
    """Make gloo speak over the interface that has this address; it would ask the host's name instead."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
            return


def _open_sockets() -> set[tuple[int, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith("socket:"):
                found.add((int(fd), name))
    return found


def _shut(fd: int, name: str) -> None:
    """Shut a connection down. A listening socket is left alone: gloo's listener ends the process when its accept fails."""
    with contextlib.suppress(OSError):
        copy: Any = socket.socket(fileno=os.dup(fd))
        with contextlib.closing(copy):
            if os.readlink(f"/proc/self/fd/{copy.fileno()}") == name and copy.family in (
                socket.AF_INET,
                socket.AF_INET6,
            ):
                copy.getpeername()
                copy.shutdown(socket.SHUT_RDWR)
