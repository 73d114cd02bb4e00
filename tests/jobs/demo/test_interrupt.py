"""Ctrl-C on `tiger demo`, twice and once, a second demo beside a living one, and one that is stopped from elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tigerbot.runs import holder

TIGER = [sys.executable, "-m", "tigerbot.cli"]


def begun(folder: Path) -> subprocess.Popen:
    """A demo whose services are up and whose sweep has begun its trials."""
    command = [*TIGER, "demo", "--port", "0", "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    trials, until = folder / "sweep/trials.jsonl", time.monotonic() + 120
    before = trials.stat().st_size if trials.exists() else 0
    while not trials.exists() or trials.stat().st_size == before:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    return process


def gone(children: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(children, timeout=90)
    return not [child.cmdline()[:4] for child in alive]


def test_a_demo_that_is_interrupted_leaves_nothing_running_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    process = begun(folder)
    children = psutil.Process(process.pid).children(recursive=True)
    beside = subprocess.run([*TIGER, "demo", "--port", "0", "--folder", str(folder)], capture_output=True, text=True)

    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to everything in the foreground
        time.sleep(0.5)

    assert beside.returncode == 2 and "another process is working on this run" in beside.stderr
    assert process.wait(timeout=90) == 130
    assert gone(children) and holder(folder) is None

    again = begun(folder)
    children = psutil.Process(again.pid).children(recursive=True)
    status = subprocess.run([*TIGER, "status", "--in", str(tmp_path)], capture_output=True, text=True, check=True)
    stopped = subprocess.run([*TIGER, "stop", "demo", "--in", str(tmp_path)], capture_output=True, text=True)

    assert "demo" in [line.split()[0] for line in status.stdout.splitlines()]
    assert stopped.returncode == 0 and "the same command continues it" in stopped.stdout, stopped.stderr
    assert again.wait(timeout=90) == 130
    assert gone(children) and holder(folder) is None


def test_a_port_in_use_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [*TIGER, "demo", "--port", str(port), "--folder", str(tmp_path / "demo")]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert f"port {port}: is in use; stop what uses it, or give --port 0" in refused.stderr
