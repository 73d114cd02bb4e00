"""A database that is locked, full, or another MLflow's: waited for, said in one line, and nothing lost."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tigerbot.errors import TrackingError
from tigerbot.tracking import TrackedRun, Tracker, serve_tracking

pytestmark = pytest.mark.soak


def begun(folder: Path, database: Path) -> tuple[Tracker, TrackedRun]:
    tracker = Tracker(f"sqlite:///{database}", "faults", folder)
    run = tracker.run("run")
    assert tracker.flush(90)
    return tracker, run


def count(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("select count(*) from metrics").fetchone()[0]


def test_a_database_that_is_locked_is_waited_for_then_said_and_then_takes_all(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tracker, run = begun(tmp_path / "run", tmp_path / "m.db")
    with closing(sqlite3.connect(tmp_path / "m.db", isolation_level=None)) as holder:
        holder.execute("begin immediate")
        for step in range(100):
            run.log({"loss": step / 3}, step=step)
        assert not tracker.flush(30)  # MLflow itself waits 20 s
        holder.execute("rollback")

    assert tracker.close(60)
    lines = [line for line in capfd.readouterr().err.splitlines() if "MLflow" in line]
    assert len(lines) == 2 and "database is locked" in lines[0] and "has taken what waited" in lines[1]
    assert count(tmp_path / "m.db") == 100


@pytest.mark.root
def test_a_full_disk_under_mlflow_is_said_once_and_loses_nothing(
    small_disk: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    database = small_disk("20m") / "m.db"
    tracker, run = begun(tmp_path / "run", database)
    with closing(sqlite3.connect(database)) as connection:  # its log holds room that was asked for already
        connection.execute("pragma wal_checkpoint(truncate)")
    free = shutil.disk_usage(database.parent).free
    (database.parent / "ballast").write_bytes(bytes(free - 64 * 1024))
    for step in range(5000):
        run.log({"loss": step / 3, "accuracy": step / 7}, step=step)
    stuck = tracker.flush(15)
    small_disk("60m")

    assert not stuck and tracker.close(90)
    lines = [line for line in capfd.readouterr().err.splitlines() if "MLflow" in line]
    assert len(lines) == 2 and "the disk is full" in lines[0]
    assert count(database) == 10_000


@pytest.mark.parametrize(("revision", "line"), [("0584bdc529eb", "older than"), ("ffffffffffff", "newer than")])
def test_a_database_of_another_mlflow_is_one_clear_line(tmp_path: Path, revision: str, line: str) -> None:
    tracker, _ = begun(tmp_path / "run", tmp_path / "m.db")
    assert tracker.close(30)
    with closing(sqlite3.connect(tmp_path / "m.db")) as connection:
        connection.execute("update alembic_version set version_num = ?", (revision,))
        connection.commit()
    began = time.monotonic()

    with pytest.raises(TrackingError, match=f"was written by an MLflow {line}"):
        serve_tracking(f"sqlite:///{tmp_path}/m.db")
    assert time.monotonic() - began < 60
