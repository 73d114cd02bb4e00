"""A local MLflow server over a SQLite file: started by the first process that needs it, shared by all others.

`serve_tracking` is safe to call from several processes at once: they agree under a file lock, and all use one server.
An `http(s)://` address is taken as it is. This module knows nothing about runs or metrics.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from tigerbot.errors import TrackingError
from tigerbot.ports import free_port
from tigerbot.runs import read_json, write_json

START_TIMEOUT_S = 90.0
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


def serve_tracking(uri: str) -> TrackingServer:
    """The server of a tracking URI: `sqlite:///file` starts or joins a local one, `http(s)://` is used as is.

    Raises:
        TrackingError: the URI is of another kind, or the server does not start.
    """
    if uri.startswith(("http://", "https://")):
        return TrackingServer(uri.rstrip("/"))
    if not uri.startswith("sqlite:///"):
        raise TrackingError(
            f"got {uri!r}, wants sqlite:///file or http(s)://server", where="tracking.uri", fix="correct it"
        )
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


def _start(database: Path) -> TrackingServer:
    port = free_port()
    log = database.with_name(database.name + ".server.log")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.with_name("artifacts"))]
    # The job runner is a second process of 235 MB for features that nothing here uses.
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("ab") as output:
        process = _spawn(command, output, settings)
    server = TrackingServer(f"http://127.0.0.1:{port}", process)
    until = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(timeout=5) as http:
        while not _healthy(server.url, http):
            if process.poll() is not None or time.monotonic() > until:
                server.stop()
                raise TrackingError("the MLflow server did not start", where=str(database), fix=f"see {log}")
            time.sleep(0.1)
    return server


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
