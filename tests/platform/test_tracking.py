"""Tracking against a real MLflow server: exactly once, whatever is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.errors import TrackingError
from tigerbot.outbox import Outbox
from tigerbot.tracking import Tracker, TrackingServer, resolve_alias, serve_tracking


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(scope="module")
def server(database: Path) -> Iterator[TrackingServer]:
    server = serve_tracking(f"sqlite:///{database}")
    yield server
    server.stop()


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        return connection.execute(query).fetchall()


def metrics_of(database: Path, name: str) -> list[tuple[int, float]]:
    query = "select m.step, m.value from metrics m join runs r using (run_uuid) where r.name = '{}' order by m.step"
    return rows(database, query.format(name))


def test_a_second_process_joins_the_server_that_lives(database: Path, server: TrackingServer) -> None:
    joined = serve_tracking(f"sqlite:///{database}")
    joined.stop()

    assert joined.url == server.url
    assert serve_tracking(f"sqlite:///{database}").url == server.url


def test_runs_params_metrics_and_aliases_arrive(database: Path, server: TrackingServer, tmp_path: Path) -> None:
    tracker = Tracker(server.url, "arrive", tmp_path)
    parent = tracker.run("调参", params={"lr": 0.1, "说明": "中文"}, tags={"tiger.kind": "sweep"})
    child = tracker.run("trial-0", parent=parent)
    child.log({"loss": 1.5, "lr": 0.1}, step=0)
    child.log({"loss": float("nan")}, step=1)
    child.register("base", tmp_path / "model")
    child.finish()
    parent.finish()

    assert tracker.close(60)
    status = rows(database, "select name, status from runs where name in ('调参', 'trial-0') order by name")
    assert status == [("trial-0", "FINISHED"), ("调参", "FINISHED")]
    assert (0, 1.5) in metrics_of(database, "trial-0") and (1, 1.0) in metrics_of(database, "trial-0")
    assert rows(database, "select count(*) from tags where key = 'mlflow.parentRunId'")[0][0] == 1
    assert resolve_alias(server.url, "base") == tmp_path / "model"


def test_an_alias_nobody_has_is_one_clear_line(server: TrackingServer) -> None:
    with pytest.raises(TrackingError, match="no model has the alias 'nobody'"):
        resolve_alias(server.url, "nobody")


def test_a_resumed_run_is_the_same_run_and_repeats_no_step(
    database: Path, server: TrackingServer, tmp_path: Path
) -> None:
    for begin in (0, 3):  # the second process resumes from step 3, the first had reached step 4
        tracker = Tracker(server.url, "resume", tmp_path)
        run = tracker.run("resumed")
        for step in range(begin, begin + 5):
            run.log({"loss": step + begin / 10}, step=step)
        assert tracker.close(60)

    assert metrics_of(database, "resumed") == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 5.3),
        (6, 6.3),
        (7, 7.3),
    ]
    assert rows(database, "select count(*) from runs where name = 'resumed'") == [(1,)]


def test_nothing_is_doubled_when_a_delivery_is_repeated(database: Path, server: TrackingServer, tmp_path: Path) -> None:
    tracker = Tracker(server.url, "repeat", tmp_path)
    run = tracker.run("repeated", params={"a": 1})
    for step in range(30):
        run.log({"loss": 0.1 * step}, step=step)
    run.finish()
    assert tracker.close(60)

    (tmp_path / "tracking.jsonl.applied").unlink()  # a death just before the watermark moved
    assert Tracker(server.url, "repeat", tmp_path).close(60)

    assert len(metrics_of(database, "repeated")) == 30
    assert rows(database, "select count(*) from runs where name = 'repeated'") == [(1,)]


def test_a_server_that_is_down_at_the_start_and_killed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    database = tmp_path / "own.db"
    first = serve_tracking(f"sqlite:///{database}")
    tracker = Tracker(f"sqlite:///{database}", "down", tmp_path / "run")
    run = tracker.run("survivor")
    began = time.monotonic()
    for step in range(200):
        run.log({"loss": float(step)}, step=step)
        if step == 50:
            first.stop()
    assert time.monotonic() - began < 15  # logging never waited for a server
    run.finish()

    assert tracker.close(120)
    assert [step for step, _ in metrics_of(database, "survivor")] == list(range(200))


def test_a_server_that_never_answers_leaves_everything_on_disk(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tracker = Tracker("http://127.0.0.1:9", "nowhere", tmp_path)
    tracker.run("lonely").log({"loss": 1.0}, step=0)

    assert not tracker.close(1)
    assert "the rest waits in" in capfd.readouterr().err
    assert [record["op"] for record in Outbox(tmp_path / "tracking.jsonl").records()] == ["start", "log"]


def test_a_process_killed_at_any_moment_loses_and_doubles_nothing(
    database: Path, server: TrackingServer, tmp_path: Path
) -> None:
    story = textwrap.dedent("""
        import sys, pathlib, time
        from tigerbot.tracking import Tracker
        tracker = Tracker(sys.argv[1], "killed", pathlib.Path(sys.argv[2]))
        run = tracker.run("killed")
        for step in range(400):
            run.log({"loss": 1 / (step + 1)}, step=step)
            time.sleep(0.002)
        run.finish()
        assert tracker.close(60)
    """)
    command = [sys.executable, "-c", story, server.url, str(tmp_path)]
    for delay_s in (1.0, 1.8, 2.8):
        process = subprocess.Popen(command)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, timeout=120)

    assert [step for step, _ in metrics_of(database, "killed")] == list(range(400))
    assert rows(database, "select status from runs where name = 'killed'") == [("FINISHED",)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=8), st.integers()), max_size=12), st.integers(0, 40))
def test_an_outbox_cut_anywhere_keeps_every_whole_record(tmp_path_factory, records, cut) -> None:
    path = tmp_path_factory.mktemp("outbox") / "o.jsonl"
    outbox = Outbox(path)
    for record in records:
        outbox.append(record)
    outbox.close()
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])

    again = Outbox(path)
    again.append({"new": 1})

    kept = list(again.records())
    assert kept[-1] == {"new": 1}
    assert kept[:-1] == records[: len(kept) - 1]
