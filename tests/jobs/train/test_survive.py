"""`tiger run` killed with SIGKILL, for real: the driver, and a worker. The same command goes on to the same bits."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_corpus import Corpus, as_file, fingerprint

TIGER = [sys.executable, "-m", "tigerbot.cli", "run"]
STEPS = 60


def spec_of(corpus: Corpus, name: str, storage: Path) -> dict[str, Any]:
    return corpus.spec(name, storage, tokens=STEPS * 1024, batch_tokens=1024, micro_batch=16) | {
        "scale": {"workers": 2, "threads_per_worker": 1},
        "storage": {"uri": str(storage), "keep": 3},
    }


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    storage = tmp_path_factory.mktemp("undisturbed")
    raw = spec_of(corpus, "survivor", storage)
    subprocess.run([*TIGER, str(as_file(raw, storage))], check=True, timeout=200)
    return fingerprint(raw, STEPS)


@pytest.mark.soak
def test_killed_again_and_again_it_still_reaches_the_same_bits(
    corpus: Corpus, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Eight times at any moment: while Ray starts, in a step, in a checkpoint."""
    raw = spec_of(corpus, "survivor", tmp_path)
    command = [*TIGER, str(as_file(raw, tmp_path))]
    for _ in range(8):
        process = subprocess.Popen(command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=random.uniform(2, 30))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        psutil.wait_procs(children, timeout=90)

    subprocess.run(command, check=True, timeout=200)

    assert fingerprint(raw, STEPS) == undisturbed
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("survivor", "FINISHED")]
        steps = database.execute("select step from metrics where key = 'loss' order by step").fetchall()
    assert [step for (step,) in steps] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": [{"path": "/nowhere"}]}}, "/nowhere: is not a folder of token shards"),
        ({"model": {"preset": "tinny"}}, "wants one of tiny"),
        ({"model": {"preset": "tiny"}}, "a preset has no tokenizer"),
        ({"deepspeed": {"zero_stage": 7}}, "wants 0, 1, 2 or 3"),
        ({"model": {"path": "/nowhere"}}, "/nowhere: there is no such folder"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line_before_anything_starts(
    corpus: Corpus, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    raw = corpus.spec("bad", tmp_path)
    for field, value in change.items():
        tokenizer = {"tokenizer": raw["model"]["tokenizer"]} if value == {"preset": "tinny"} else {}
        raw[field] = (raw["data"] | value) if field == "data" else value | tokenizer

    done = subprocess.run([*TIGER, str(as_file(raw, tmp_path))], capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
