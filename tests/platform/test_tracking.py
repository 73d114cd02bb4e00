"""Tracking against a real MLflow server: exactly once, whatever is killed."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fault_proxy import Fault, FaultProxy

from tigerbot import mlflow_server
from tigerbot.applier import OUTBOX, Applier
from tigerbot.batches import Record
from tigerbot.errors import SpecError, StorageError, TrackingError
from tigerbot.mlflow_server import version_warning
from tigerbot.spool import SpoolReader
from tigerbot.tracking import Tracker, TrackingServer, resolve_alias, serve_tracking


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(scope="module")
def server(database: Path) -> Iterator[TrackingServer]:
    server = serve_tracking(f"sqlite:///{database}")
    yield server
    server.stop()


@pytest.fixture
def applier(server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Applier]:
    """`applier("job", fresh=..)`: what a courier uses, in this process."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def made(job: str, *, fresh: bool, url: str = "", say: Callable[[str], None] = print) -> Applier:
        return Applier(url or server.url, "applied", job, fresh=fresh, refused=tmp_path / "refused.jsonl", say=say)

    return made


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        return connection.execute(query).fetchall()


def metrics_of(database: Path, name: str, metric: str = "loss") -> list[tuple[int, float]]:
    query = (
        "select m.step, m.value from metrics m join runs r using (run_uuid)"
        f" where r.name = '{name}' and m.key = '{metric}' and r.lifecycle_stage = 'active' order by m.step"
    )
    return rows(database, query)


def runs_named(database: Path, name: str) -> list[str]:
    query = f"select status from runs where name = '{name}' and lifecycle_stage = 'active'"
    return [status for (status,) in rows(database, query)]


def start(key: str, params: dict[str, str] | None = None) -> Record:
    name = key.partition("/")[2]
    return {"run": key, "op": "start", "at": 1000, "name": name, "params": params or {}, "tags": {}, "parent": ""}


def log(key: str, step: int, **metrics: float) -> Record:
    return {"run": key, "op": "log", "at": 1000 + step, "step": step, "metrics": metrics}


def finish(key: str, status: str = "FINISHED") -> Record:
    return {"run": key, "op": "finish", "at": 9000, "status": status}


def until_it_works(applier: Applier, records: list[Record]) -> int:
    for attempt in range(20):
        try:
            applier.apply(records)
            return attempt
        except Exception:
            applier.disconnect()
    raise AssertionError("never applied")


def test_a_second_process_joins_the_server_that_lives(database: Path, server: TrackingServer) -> None:
    joined = serve_tracking(f"sqlite:///{database}")
    joined.stop()

    assert joined.url == server.url
    assert serve_tracking(f"sqlite:///{database}").url == server.url
    assert rows(database, "pragma journal_mode") == [("wal",)]


def test_runs_params_metrics_files_and_aliases_arrive(database: Path, server: TrackingServer, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    tracker = Tracker(server.url, "arrive", tmp_path, tags={"tiger.spec_hash": "abc"})
    parent = tracker.run("调参", params={"lr": 0.1, "说明": "中文", "long": "x" * 7000}, tags={"tiger.kind": "sweep"})
    child = tracker.run("trial-0", parent=parent)
    child.log({"loss": 0.1 + 0.2}, step=0, at=1_700_000_000.5)
    child.log({"lr": 0.1}, step=0)
    child.log({"loss": float("nan")}, step=1)
    child.artifact(tmp_path / "table.csv")
    child.register("base", tmp_path / "model")
    child.finish()
    parent.finish()
    forgotten = tracker.run("trial-1", parent=parent)

    assert tracker.close(60)
    assert runs_named(database, "trial-0") == runs_named(database, "调参") == ["FINISHED"]
    assert runs_named(database, "trial-1") == ["KILLED"], forgotten.key
    assert metrics_of(database, "trial-0") == [(0, 0.1 + 0.2)]
    assert metrics_of(database, "trial-0", "lr") == [(0, 0.1)]
    assert metrics_of(database, "trial-0", "diverged") == [(1, 1.0)]
    assert rows(database, "select timestamp from metrics where value = 0.1 + 0.2") == [(1_700_000_000_500,)]
    assert "sha256:" in rows(database, "select value from params where key = 'long'")[0][0]
    assert rows(database, "select count(*) from tags where key = 'mlflow.parentRunId'") == [(2,)]
    assert rows(database, "select count(*) from tags where key = 'tiger.spec_hash'") == [(3,)]
    assert list(database.parent.rglob("table.csv"))
    assert resolve_alias(server.url, "base") == tmp_path / "model"
    assert [path.suffix for path in (tmp_path / OUTBOX).iterdir() if path.suffix == ".records"] == []


def test_an_alias_nobody_has_is_one_clear_line(server: TrackingServer) -> None:
    with pytest.raises(TrackingError, match="no model has the alias 'nobody'"):
        resolve_alias(server.url, "nobody")


def test_an_address_of_another_kind_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="wants sqlite:///file or http"):
        Tracker("mlruns", "e", tmp_path)


def test_a_resumed_run_is_the_same_run_and_repeats_no_step(database: Path, applier: Callable[..., Applier]) -> None:
    key = "r1/resumed"
    for begin in (0, 3):  # the second life resumes from step 3, the first had reached step 4
        life = applier("r1", fresh=begin == 0)
        life.apply([start(key, {"workers": str(begin)})])
        for step in range(begin, begin + 5):
            life.apply([log(key, step, loss=step + begin / 10)])
        life.apply([finish(key)])

    expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.3, 6.3, 7.3]
    assert metrics_of(database, "resumed") == list(enumerate(expected))
    assert runs_named(database, "resumed") == ["FINISHED"]
    query = "select p.value from params p join runs r using (run_uuid) where r.name = 'resumed'"
    assert rows(database, query) == [("0",)]  # MLflow takes no other value, and the run is the same


def test_whichever_request_is_lost_on_its_way_or_back_nothing_is_doubled(
    database: Path, server: TrackingServer, applier: Callable[..., Applier]
) -> None:
    proxy = FaultProxy(urlsplit(server.url).port or 0)
    hurt = 0
    for damage in ("kill_answer", "kill_upload", "status_500"):
        for nth in range(5):
            name = f"{damage}-{nth}"
            records = [start(f"p/{name}", {"a": "1"}), *(log(f"p/{name}", s, loss=s / 3) for s in range(20))]
            life = applier("p", fresh=True, url=proxy.url)
            life.apply([])
            proxy.hurt(Fault("delay", "POST", times=nth))  # so many requests pass
            proxy.hurt(Fault(damage, "POST", times=1))  # type: ignore[arg-type]
            hurt += until_it_works(life, records)
            hurt += until_it_works(life, [log(f"p/{name}", 20, loss=20 / 3), finish(f"p/{name}")])
            proxy.heal()
            until_it_works(applier("p", fresh=False, url=proxy.url), records)  # killed before the watermark

            assert metrics_of(database, name) == [(s, s / 3) for s in range(21)], name
            assert len(runs_named(database, name)) == 1, name
    proxy.close()
    assert hurt >= 10


def test_a_run_that_a_lost_request_made_late_is_deleted(database: Path, applier: Callable[..., Applier]) -> None:
    key = "d/late"
    for _ in range(2):  # two first lives: neither looks for what the other made
        life = applier("d", fresh=True)
        life.apply([start(key), log(key, 0, loss=1.0)])
    assert len(runs_named(database, "late")) == 2
    applier("d", fresh=False).apply([start(key), log(key, 1, loss=2.0), finish(key)])

    assert runs_named(database, "late") == ["FINISHED"]
    assert metrics_of(database, "late") == [(0, 1.0), (1, 2.0)]


def test_what_mlflow_refuses_costs_itself_and_is_kept(
    database: Path, server: TrackingServer, applier: Callable[..., Applier], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    said: list[str] = []
    life = applier("f", fresh=True, say=said.append)
    life.apply([start("f/deleted"), start("f/odd", {"bad|name": "1", "good": "2"})])
    (run_id,) = rows(database, "select run_uuid from runs where name = 'deleted'")[0]
    MlflowClient(server.url).delete_run(run_id)
    life.apply([log("f/deleted", 0, loss=1.0), *(log("f/odd", s, **{"loss": 1.0, "a(b)": 1.0}) for s in range(3))])

    assert metrics_of(database, "odd") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert len(said) == 5 and "it is kept in" in said[0]
    kept = [json.loads(line)["run"] for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert kept == ["f/odd", "f/deleted", "f/odd", "f/odd", "f/odd"]


def test_jobs_of_this_machine_that_vanished_are_ended_by_the_next_one(
    database: Path, applier: Callable[..., Applier], tmp_path: Path
) -> None:
    vanished = Tracker("http://127.0.0.1:9", "applied", tmp_path / "vanished")  # its machine died: nobody delivers
    key = "gone1/job"
    tags = {"tiger.folder": str(tmp_path / "vanished"), "tiger.host": os.uname().nodename}
    applier("gone1", fresh=True).apply([start(key) | {"tags": tags}, start("gone1/its trial")])
    applier("next1", fresh=True).apply([start("next1/other")])
    alive = runs_named(database, "job")
    vanished.close(0)
    applier("next2", fresh=True).apply([start("next2/other2")])

    assert alive == ["RUNNING"]
    assert runs_named(database, "job") == runs_named(database, "its trial") == ["KILLED"]
    assert runs_named(database, "other") == ["RUNNING"]


def test_a_server_that_is_killed_twice_costs_nothing(tmp_path: Path) -> None:
    database = tmp_path / "own.db"
    with sqlite3.connect(database) as cut_short:  # what a kill leaves that comes while MLflow makes its tables
        cut_short.execute("create table _alembic_tmp_latest_metrics (a)")
        cut_short.execute("create table metrics (a)")
    (tmp_path / "own.db.making").touch()
    tracker = Tracker(f"sqlite:///{database}", "down", tmp_path / "run")
    run = tracker.run("survivor")
    for part in range(3):
        for step in range(100 * part, 100 * part + 100):
            run.log({"loss": step / 7}, step=step)
        if part < 2:
            assert tracker.flush(60)
            card = json.loads((tmp_path / "own.db.server.json").read_text())
            os.killpg(card["pid"], signal.SIGKILL)
    run.finish()

    assert tracker.close(120)
    assert metrics_of(database, "survivor") == [(step, step / 7) for step in range(300)]
    assert runs_named(database, "survivor") == ["FINISHED"]


def test_a_job_killed_at_any_moment_loses_and_doubles_nothing(
    database: Path, server: TrackingServer, tmp_path: Path
) -> None:
    story = textwrap.dedent("""
        import sys, pathlib, time
        from tigerbot.tracking import Tracker
        tracker = Tracker(sys.argv[1], "killed", pathlib.Path(sys.argv[2]))
        run = tracker.run("killed")
        for step in range(400):
            run.log({"loss": 1 / (step + 1)}, step=step)
            print(step, flush=True)
            time.sleep(0.002)
        run.finish()
        assert tracker.close(60)
    """)
    command = [sys.executable, "-c", story, server.url, str(tmp_path)]
    said = 0
    for last in (120, 250):  # the second life begins while the courier of the first one is at work
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = next(int(line) for line in process.stdout if int(line) == last)
        process.kill()
        process.wait()
    until = time.monotonic() + 60
    while runs_named(database, "killed") != ["KILLED"] and time.monotonic() < until:
        time.sleep(0.2)
    after_death = (runs_named(database, "killed"), len(metrics_of(database, "killed")))
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)

    assert after_death[0] == ["KILLED"] and after_death[1] > said
    assert metrics_of(database, "killed") == [(step, 1 / (step + 1)) for step in range(400)]
    assert runs_named(database, "killed") == ["FINISHED"]


def test_a_server_that_never_answers_fills_the_outbox_and_then_the_job_waits(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tracker = Tracker("http://127.0.0.1:9", "nowhere", tmp_path, limit_bytes=20_000)
    run = tracker.run("lonely")
    said = []

    def talk() -> None:
        for step in range(1000):
            run.log({"loss": 1.0}, step=step)
            said.append(step)

    threading.Thread(target=talk, daemon=True).start()
    time.sleep(1.0)
    stuck = len(said)

    assert not tracker.close(0.5)
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if "this job waits until it does" in line]) == 1
    assert "the rest waits in" in lines[-1]
    assert 100 < stuck == len(said) < 1000
    records, _ = SpoolReader(tmp_path / OUTBOX).read(SpoolReader(tmp_path / OUTBOX).applied, 2000)
    assert [record.get("step") for record in records] == [None, *range(stuck)]


@pytest.mark.root
def test_a_full_disk_is_one_clear_line(small_disk: Callable[[str], Path]) -> None:
    tracker = Tracker("http://127.0.0.1:9", "full", small_disk("1m"))
    run = tracker.run("full")

    with pytest.raises(StorageError, match="the disk is full"):
        for step in range(100_000):
            run.log({"loss": 1.0}, step=step)
    tracker.close(0)


def test_a_locked_database_is_waited_for_and_then_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_server, "LOCKED_TIMEOUT_S", 1.0)
    holder = sqlite3.connect(tmp_path / "m.db", isolation_level=None)
    holder.execute("create table t (a)")
    holder.execute("begin exclusive")
    began = time.monotonic()

    with pytest.raises(TrackingError, match=r"m\.db: another process has locked it for more than 1 s"):
        serve_tracking(f"sqlite:///{tmp_path}/m.db")
    assert time.monotonic() - began > 0.9


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("no database" * 1000)

    with pytest.raises(TrackingError, match="file is not a database"):
        serve_tracking(f"sqlite:///{tmp_path}/m.db")


@pytest.mark.parametrize(("version", "age"), [("2.9.1", "older"), ("99.0.0", "newer"), ("3.0.0", ""), ("<html>", "")])
def test_a_server_of_another_age_is_one_clear_line(version: str, age: str) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(version.encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        warning = version_warning(f"http://127.0.0.1:{other.server_port}")

    assert (f"is {age} than the client ({version}" in warning) if age else warning == ""
