"""Training whose storage is a bucket: a machine that is gone is replaced by another one with nothing but the spec."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from small_corpus import Corpus, as_file, kill_driver

from tigerbot.models import load_model
from tigerbot.storage import open_store
from tigerbot_jobs.train.ledger import read_events
from tigerbot_jobs.train.metrics import read_rows

TIGER = [sys.executable, "-m", "tigerbot.cli", "run"]
STEPS = 40


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.put(f"{url}/runs", timeout=2).is_success:
                break
        time.sleep(0.2)
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in (settings | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    yield "s3://runs/team"
    server.kill()
    server.wait()


@pytest.mark.soak
def test_another_machine_goes_on_from_the_bucket(corpus: Corpus, bucket: str, tmp_path: Path) -> None:
    raw = corpus.spec("far", tmp_path, tokens=STEPS * 1024, batch_tokens=1024, micro_batch=16)
    raw |= {"storage": {"uri": bucket}, "fault_tolerance": {"checkpoint_every_steps": 4}}
    path = str(as_file(raw, tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    process = subprocess.Popen([*TIGER, path], cwd=first)
    until = time.monotonic() + 120
    while not open_store(bucket).committed("far/checkpoints"):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    kill_driver(process)
    for left in Path("/dev/shm").glob("tiger-*"):  # another machine does not have what was in this one's memory
        shutil.rmtree(left)

    done = subprocess.run([*TIGER, path], cwd=second, capture_output=True, text=True, timeout=200)

    assert done.returncode == 0, done.stderr
    folder = second / "tiger-runs/.staging/runs/team/far"
    (restored,) = [event for event in read_events(folder / "ledger.jsonl") if event.kind == "restored"]
    assert restored.text("tier") == "storage" and restored.whole("step") >= 4
    assert read_rows(folder / "metrics.jsonl")[-1]["step"] == STEPS
    open_store(bucket).fetch_folder("far/model", tmp_path / "model")
    assert load_model(tmp_path / "model").config.hidden_size == 256


def test_a_bucket_that_does_not_exist_is_one_line(corpus: Corpus, bucket: str, tmp_path: Path) -> None:
    raw = corpus.spec("far", tmp_path) | {"storage": {"uri": "s3://nowhere/x"}, "fault_tolerance": {"max_failures": 0}}

    done = subprocess.run(
        [*TIGER, str(as_file(raw, tmp_path))], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 2
    assert "the bucket does not exist" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
