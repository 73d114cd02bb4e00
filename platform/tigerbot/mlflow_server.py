"""A local MLflow server over a SQLite file: started by the first process that needs it, shared by all others.

`serve_tracking` is safe to call from several processes at once: they agree under a file lock, and all use one server.
An `http(s)://` address is taken as it is. This module knows nothing about runs or metrics.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from tigerbot.errors import SpecError, TrackingError
from tigerbot.ports import free_port
from tigerbot.runs import read_json, write_json
from tigerbot.staging import disk_full, is_full

START_TIMEOUT_S = 90.0
LOCKED_TIMEOUT_S = 20.0  # as long as MLflow itself waits for another writer
_ROOM_BYTES = 256 * 1024  # a database with less around it takes nothing more
_PR_SET_PDEATHSIG = 1


@dataclass
class TrackingServer:
    """An MLflow server's address. `stop()` ends it if this process started it, and does nothing otherwise."""

    url: str
    _process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(timeout=10)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def check_tracking_uri(uri: str) -> None:
    """Raises: SpecError: not a kind of address that tracking knows."""
    if not uri.startswith(("http://", "https://", "sqlite:///")):
        raise SpecError(
            f"got {uri!r}, wants sqlite:///file or http(s)://server", where="tracking.uri", fix="correct it"
        )


def serve_tracking(uri: str) -> TrackingServer:
    """The server of a tracking URI: `sqlite:///file` starts or joins a local one, `http(s)://` is used as is.

    Raises:
        SpecError: the URI is of another kind.
        TrackingError: the database is locked, or another MLflow's, or the server does not start.
    """
    check_tracking_uri(uri)
    if not uri.startswith("sqlite:///"):
        return TrackingServer(uri.rstrip("/"))
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    card = database.with_name(database.name + ".server.json")
    with database.with_name(database.name + ".server.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_json(card, {}).get("url", "")
        with httpx.Client(timeout=5) as http:
            if known and _healthy(known, http):
                return TrackingServer(known)
        server = _start(database)
        write_json(card, {"url": server.url, "pid": server._process.pid if server._process else 0})
        return server


def database_trouble(uri: str) -> str:
    """Why a local database takes nothing now; empty where it does, or where it is another machine's."""
    if not uri.startswith("sqlite:///"):
        return ""
    database = Path(uri.removeprefix("sqlite:///"))
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True, timeout=0, isolation_level=None)) as one:
            one.execute("begin immediate")
            one.execute("rollback")
        free = shutil.disk_usage(database.parent).free
    except (sqlite3.OperationalError, OSError) as error:
        return f"{error} ({database})" if "locked" in str(error) else ""
    return f"the disk is full ({database.parent})" if free < _ROOM_BYTES else ""


def version_warning(url: str) -> str:
    """One line where a server's MLflow is of another major version than ours; "" otherwise."""
    try:
        answer = httpx.get(f"{url}/version", timeout=5)
    except httpx.HTTPError:
        return ""
    theirs, ours = answer.text.strip(), importlib.metadata.version("mlflow")
    if answer.status_code != 200 or not re.match(r"\d+\.\d", theirs) or theirs.split(".")[0] == ours.split(".")[0]:
        return ""
    age = "older" if int(theirs.split(".")[0]) < int(ours.split(".")[0]) else "newer"
    return f"the MLflow server at {url} is {age} than the client ({theirs}, here {ours}); install the same on both"


def _start(database: Path) -> TrackingServer:
    # Killed while it makes its tables, MLflow leaves a file that no later start can use, and that holds nothing yet.
    making = database.with_name(database.name + ".making")
    if making.exists():
        for end in ("", "-wal", "-shm"):
            database.with_name(database.name + end).unlink(missing_ok=True)
    if not database.exists():
        making.touch()
    _prepare(database)
    port = free_port()
    log = database.with_name(database.name + ".server.log")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.with_name("artifacts"))]
    # The job runner is a second process of 235 MB for features that nothing here uses.
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("wb") as output:
        process = _spawn(command, output, settings)
    server = TrackingServer(f"http://127.0.0.1:{port}", process)
    until = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(timeout=5) as http:
        while not _healthy(server.url, http):
            if process.poll() is not None or time.monotonic() > until:
                server.stop()
                raise _not_started(database, log)
            time.sleep(0.1)
    making.unlink(missing_ok=True)
    return server


def _prepare(database: Path) -> None:
    """Set write-ahead logging, once and for good: a third faster, and readers keep nobody waiting."""
    try:
        with closing(sqlite3.connect(database, timeout=LOCKED_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        said = str(error)
        if "full" in said or is_full(error):
            raise disk_full(database) from None
        if "locked" in said:
            said = f"another process has locked it for more than {LOCKED_TIMEOUT_S:.0f} s"
        raise TrackingError(said, where=str(database), fix="end what holds it, or name another tracking.uri") from None


def _not_started(database: Path, log: Path) -> TrackingError:
    """Why a server ended at once, from what it said."""
    said = log.read_text(errors="replace")
    found = re.search(r"found version (\w+), but expected", said)
    if found is None:
        return TrackingError("the MLflow server did not start", where=str(database), fix=f"see {log}")
    ours = importlib.metadata.version("mlflow")
    package = importlib.util.find_spec("mlflow")
    folder = Path(package.origin).parent if package and package.origin else Path()
    if list((folder / "store/db_migrations/versions").glob(f"{found[1]}_*.py")):
        fix = f"copy it, then `mlflow db upgrade sqlite:///{database}`"
        return TrackingError(f"was written by an MLflow older than {ours}", where=str(database), fix=fix)
    fix = "install that version, or name another tracking.uri"
    return TrackingError(f"was written by an MLflow newer than {ours}", where=str(database), fix=fix)


def _spawn(command: list[str], output: IO[bytes], settings: dict[str, str]) -> subprocess.Popen[bytes]:
    # Its own session, so that Ctrl-C reaches us and not the server before its last metrics; and it dies with us.
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=settings,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _healthy(url: str, http: httpx.Client) -> bool:
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
