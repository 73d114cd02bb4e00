"""What goes wrong on a user's machine while training: the disk, a checkpoint's bytes, MLflow, a stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from small_corpus import Corpus, as_file, as_train, fingerprint, forget_memory, kill_driver

from tigerbot.runs import read_json
from tigerbot_jobs.train.metrics import read_rows

TIGER = [sys.executable, "-m", "tigerbot.cli"]
STEPS = 30


def spec_of(corpus: Corpus, storage: Path, **fields: Any) -> dict[str, Any]:
    raw = corpus.spec("faulty", storage, tokens=STEPS * 1024, batch_tokens=1024, micro_batch=16)
    raw |= {"scale": {"workers": 1, "threads_per_worker": 1}}
    raw |= {"fault_tolerance": {"checkpoint_every_steps": 2, "max_failures": 0}}
    return raw | fields


def tiger(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TIGER, *words], capture_output=True, text=True, timeout=240, **options)


def begun(raw: dict[str, Any], folder: Path, step: int) -> subprocess.Popen:
    """`tiger run` that has reached a step."""
    process = subprocess.Popen([*TIGER, "run", str(as_file(raw, folder))], start_new_session=True)
    metrics, until = Path(raw["storage"]["uri"]) / raw["name"] / "metrics.jsonl", time.monotonic() + 120
    while not (rows := read_rows(metrics)) or rows[-1]["step"] < step:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return process


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 50 MB: room for two checkpoints of 21 MB and not for a third."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]).returncode:
        pytest.skip("this container may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.soak
def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(
    corpus: Corpus, small_disk: Path, tmp_path: Path
) -> None:
    raw = spec_of(corpus, small_disk, tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    path = as_file(raw, tmp_path)

    full = tiger("run", str(path))

    assert full.returncode == 1
    assert "the disk is full; free space" in full.stderr.splitlines()[-1] and "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=600m", str(small_disk)], check=True)
    assert tiger("run", str(path)).returncode == 0
    assert [row["step"] for row in read_rows(small_disk / "faulty/metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.soak
def test_a_checkpoint_with_a_flipped_byte_is_set_aside_and_the_one_before_it_is_used(
    corpus: Corpus, tmp_path: Path
) -> None:
    raw = spec_of(corpus, tmp_path)
    process = begun(raw, tmp_path, 7)
    kill_driver(process)
    newest = max((tmp_path / "faulty/checkpoints").glob("*/MANIFEST.json")).parent
    file = newest / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    forget_memory(as_train(raw))

    resumed = tiger("run", str(tmp_path / "faulty.yaml"))

    assert resumed.returncode == 0
    assert f"checkpoint faulty/checkpoints/{newest.name} is damaged" in resumed.stdout + resumed.stderr
    assert fingerprint(raw, STEPS)


@pytest.mark.soak
def test_a_stopped_run_leaves_nothing_and_the_same_command_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    raw = spec_of(corpus, tmp_path, train=corpus.spec("x", tmp_path)["train"] | {"tokens": 400 * 256})
    process = begun(raw, tmp_path, 5)
    children = psutil.Process(process.pid).children(recursive=True)
    step = read_rows(tmp_path / "faulty/metrics.jsonl")[-1]["step"]

    assert "faulty" in tiger("status", "--in", str(tmp_path)).stdout
    stopped = tiger("stop", "faulty", "--in", str(tmp_path))

    assert stopped.returncode == 0 and "the same command continues it" in stopped.stdout
    assert process.wait(timeout=30) == 130
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("KILLED",)]
    assert tiger("run", str(tmp_path / "faulty.yaml")).returncode == 0
    assert len(read_rows(tmp_path / "faulty/metrics.jsonl")) == 400 > step
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


def mlflow_at(port: int, database: Path) -> subprocess.Popen:
    words = f"server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{database}"
    server = subprocess.Popen([sys.executable, "-m", "mlflow", *words.split()], start_new_session=True)
    until = time.monotonic() + 90
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                return server
        time.sleep(0.3)
    raise TimeoutError("MLflow did not start")


@pytest.mark.soak
def test_training_does_not_wait_for_mlflow_and_what_it_said_arrives_later(corpus: Corpus, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    raw = spec_of(corpus, tmp_path, tracking={"uri": f"http://127.0.0.1:{port}", "experiment": "late"})
    path = str(as_file(raw, tmp_path))

    alone = tiger("run", path)

    assert alone.returncode == 0 and "MLflow has not taken everything" in alone.stderr
    assert read_json(tmp_path / "faulty/state.json", {})["status"] == "done"
    server = mlflow_at(port, tmp_path / "late.db")
    try:
        assert tiger("run", path).returncode == 0
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    with sqlite3.connect(tmp_path / "late.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("faulty", "FINISHED")]
        steps = database.execute("select step from metrics where key = 'loss' order by step").fetchall()
    assert [step for (step,) in steps] == list(range(1, STEPS + 1))
