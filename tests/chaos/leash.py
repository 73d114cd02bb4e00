"""Runs a command and owns every process that comes of it: none outlives the one who holds the leash.

    python leash.py [--machine NAME --memory-mb N] [--cwd DIR] LOG COMMAND...

A subreaper: daemons that leave their parent become its children, so that it finds them all. It says `exited CODE` on
its standard output when the command itself ends, goes on holding what the command left running, and kills all of that
when its standard input closes, which the kernel does for a holder that dies in whatever way. As the first process of
new namespaces (`--machine`) it takes a host name and a /dev/shm of its own, whose content is gone with it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--machine", default="")
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--cwd")
    parser.add_argument("log")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if asked.machine:
        socket.sethostname(asked.machine)
        own = ["mount", "-t", "tmpfs", "-o", f"size={asked.memory_mb}m", "tmpfs", "/dev/shm"]
        subprocess.run(own, check=True)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with open(asked.log, "a") as log:
        child = subprocess.Popen(
            asked.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=asked.cwd,
            start_new_session=True,
        )
    try:
        _hold(child.pid, woken)
    finally:
        _kill_all()


def _hold(command: int, woken: int) -> None:
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid, code in _reaped():
                if pid == command:
                    print(f"exited {code}", flush=True)
        if 0 in ready and not os.read(0, 1):
            return


def _reaped() -> list[tuple[int, int]]:
    found = []
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((ended[0], os.waitstatus_to_exitcode(ended[1])))
    return found


def _kill_all() -> None:
    """Again and again, since a process may have forked between the look and the kill."""
    while family := _descendants():
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reaped()


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            after_name = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return found


if __name__ == "__main__":
    main()
