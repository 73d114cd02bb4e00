"""Ctrl-C on `tiger demo`, once and twice, and a second demo beside a living one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tigerbot.runs import holder

DEMO = [sys.executable, "-m", "tigerbot.cli", "demo", "--port", "0", "--folder"]


def begun(folder: Path) -> subprocess.Popen:
    """A demo whose services are up and whose first stages run."""
    process = subprocess.Popen([*DEMO, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    until = time.monotonic() + 120
    while "2/6" not in process.stdout.readline():
        assert process.poll() is None and time.monotonic() < until
    time.sleep(3)  # the sweep's trials are on their way
    return process


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_nothing_running(tmp_path: Path, times: int) -> None:
    process = begun(tmp_path / "demo")
    children = psutil.Process(process.pid).children(recursive=True)
    beside = subprocess.run([*DEMO, str(tmp_path / "demo")], capture_output=True, text=True, timeout=60)

    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)

    assert beside.returncode == 2 and "another process is working on this run" in beside.stderr
    assert process.wait(timeout=90) == 130
    _, alive = psutil.wait_procs(children, timeout=90)
    assert not [child.cmdline()[:4] for child in alive]
    assert holder(tmp_path / "demo") is None
    assert (tmp_path / "demo/corpus/state.json").exists()  # what was done is kept
