"""The `tiger run` of a sweep as a process of its own: what is wrong is one line, and what was done stays done."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
STEPS = 4


def command(folder: Path, **fields: Any) -> list[str]:
    spec = {
        "kind": "sweep",
        "name": "walks",
        "target": "objectives:walk",
        "space": {"x": {"uniform": [-1, 1]}},
        "params": {"sleep_s": 0.3, "steps": STEPS, "folder": str(folder)},
        "trials": 16,
        "searcher": "random",
        "scheduler": "none",
        "storage": {"uri": str(folder / "disk")},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    path = folder / "walks.yaml"
    path.write_text(yaml.safe_dump(spec | fields))
    return [sys.executable, "-m", "tigerbot.cli", "run", str(path)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}


def refusal(words: list[str], status: int) -> str:
    """The one line that a command ends with."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tiger: ")]
    return line


def wait_for_ends(folder: Path, count: int, driver: subprocess.Popen[str]) -> None:
    journal, until = folder / "disk/walks/trials.jsonl", time.monotonic() + 150
    while not journal.exists() or journal.read_text().count('"event":"end"') < count:
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(query).fetchall()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {
                "target": "tigerbot_jobs.sweep.example:digits",
                "space": {"momentumm": {"uniform": [0, 1]}},
                "params": {},
            },
            ["space.momentumm", "no such parameter", "did you mean momentum?"],
        ),
        (
            {"space": {"x": {"choice": [1, 2]}, "sleep_s": {"choice": [0], "when": {"x": 3}}}},
            ["space.sleep_s.when.x", "x is never 3", "it is one of [1, 2]"],
        ),
    ],
)
def test_a_space_that_cannot_be_is_one_line_before_anything_starts(
    tmp_path: Path, fields: dict[str, Any], said: list[str]
) -> None:
    line = refusal(command(tmp_path, **fields), 2)

    assert all(words in line for words in said), line
    assert not (tmp_path / "mlflow.db").exists() and not list(tmp_path.rglob("trials.jsonl"))


@pytest.mark.soak
def test_a_metric_that_nobody_reports_ends_the_command_at_the_first_trial(tmp_path: Path) -> None:
    fields = {"target": "objectives:silent", "metric": "accuracy", "space": {"x": {"uniform": [0, 1]}}, "params": {}}

    line = refusal(command(tmp_path, **fields), 2)

    assert "never reported it; it reported acuracy, size; did you mean acuracy?" in line
    journal = (tmp_path / "disk/walks/trials.jsonl").read_text()
    assert 1 <= journal.count('"event":"begin"') <= 2


@pytest.mark.soak
@pytest.mark.root
def test_a_second_driver_is_told_who_holds_the_sweep_and_a_full_disk_costs_nothing_that_was_done(
    tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk, words = small_disk("8m"), command(tmp_path)
    driver = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_ends(tmp_path, 2, driver)
    second = refusal(words, 2)
    fill(disk / "ballast")
    _, said = driver.communicate(timeout=120)
    (disk / "ballast").unlink()
    ended = (disk / "walks/trials.jsonl").read_text().count('"event":"end"')

    subprocess.run(words, env=environment(), check=True, timeout=200)

    assert f"another process is working on this run (process {driver.pid})" in second
    assert driver.returncode == 1 and "Traceback" not in said, said
    assert "the disk is full" in next(line for line in said.splitlines() if line.startswith("tiger: "))
    assert 2 <= ended < 16
    points = rows(tmp_path, "select r.name, m.step from metrics m join runs r using (run_uuid) where m.key = 'place'")
    assert Counter(points) == Counter((f"walks-trial-{n:04d}", step) for n in range(16) for step in range(1, STEPS + 1))
    trials = "select count(*), count(distinct name), min(status) from runs where name like 'walks-trial-%'"
    assert rows(tmp_path, trials) == [(16, 16, "FINISHED")]


def fill(path: Path) -> None:
    """Leave no room beside a file."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65_536))
        except OSError:
            pass
