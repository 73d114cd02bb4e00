"""One way to reach MLflow: runs, batched metrics, artifacts, registered models; exactly once, and never in the way.

What a job says goes to an outbox on its own disk and returns at once. A process beside the job, the courier, delivers
it: a dead server delays it, a dead job leaves it to the courier or to the next life of the job, and every delivery
can be repeated without doubling anything (`applier`). Of a run that nobody finished, MLflow hears that it was KILLED.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tigerbot.applier import HOST, OUTBOX
from tigerbot.batches import PARAM_LENGTH, TAG_LENGTH, fitted
from tigerbot.courier import Order
from tigerbot.courier_process import CourierProcess, tell
from tigerbot.errors import StorageError
from tigerbot.mlflow_client import FOLDER, KIND
from tigerbot.mlflow_server import TrackingServer, check_tracking_uri, serve_tracking
from tigerbot.registry import REGISTERED_MODEL, resolve_alias
from tigerbot.runs import read_json, write_json
from tigerbot.spec import flat
from tigerbot.spool import SpoolFull, SpoolWriter, backlog
from tigerbot.staging import disk_full, is_full

if TYPE_CHECKING:
    from tigerbot.runs import Run

__all__ = [
    "REGISTERED_MODEL",
    "TrackedRun",
    "Tracker",
    "TrackingServer",
    "resolve_alias",
    "serve_tracking",
    "track",
    "tracked",
]

Status = Literal["FINISHED", "FAILED", "KILLED"]
LIMIT_BYTES = 256 * 2**20  # days of a training run, about 1.5 million points


class Tracker:
    """Runs of one experiment.

    Args:
        uri: `sqlite:///file` (a local server is started, and started again if it dies) or `http(s)://server`.
        experiment: its name; made if there is none.
        folder: holds the outbox; what an earlier process left there is delivered too.
        tags: of every run.
        limit_bytes: of what waits there. At the limit whoever speaks waits for room, and the user is told.

    Raises:
        SpecError: the URI is of another kind.
        TrackingError: another process has the outbox.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        folder: Path,
        *,
        tags: Mapping[str, str] | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        check_tracking_uri(uri)
        self._tags = dict(tags or {})
        self._outbox = (folder / OUTBOX).absolute()
        self._spool = SpoolWriter(self._outbox, limit_bytes=limit_bytes)
        self._closed = False
        self._job, fresh = _job_of(folder)
        self._courier = CourierProcess(self._outbox, Order(_absolute(uri), experiment, self._job, fresh, os.getpid()))

    def run(
        self,
        name: str,
        *,
        key: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: TrackedRun | str | None = None,
    ) -> TrackedRun:
        """The run of this name (or key, where names repeat), begun or continued.

        Args:
            params: of a run that is continued, those it began with stand.
            parent: a run, or the `key` of another tracker's run in the same experiment.
        """
        tracked = TrackedRun(self, f"{self._job}/{_plain(key or name)}")
        self._say(
            tracked.key,
            "start",
            name=name,
            params={name: fitted(value, PARAM_LENGTH) for name, value in (params or {}).items()},
            tags={name: fitted(value, TAG_LENGTH) for name, value in (self._tags | dict(tags or {})).items()},
            parent=parent.key if isinstance(parent, TrackedRun) else parent or "",
        )
        return tracked

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything said so far has arrived; whether it has."""
        until = time.monotonic() + timeout_s
        self._courier.hurry()
        while backlog(self._outbox) and time.monotonic() < until:
            self._courier.keep_alive()
            time.sleep(0.02)
        return not backlog(self._outbox)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Deliver what is left and stop; whether everything arrived. What did not stays for the next time."""
        if self._closed:
            return not backlog(self._outbox)
        arrived, self._closed = self.flush(timeout_s), True
        self._spool.close()
        self._courier.end(patient=arrived)
        if not arrived:
            why = self._courier.complaint or "slow"
            tell(f"MLflow has not taken everything ({why}); the rest waits in {self._outbox}")
        return arrived

    def _say(self, key: str, op: str, at: float | None = None, **fields: Any) -> None:
        record = {"run": key, "op": op, "at": int((time.time() if at is None else at) * 1000)} | fields
        try:
            if self._courier.due:
                self._courier.keep_alive()
            self._append(record)
        except OSError as error:
            if not is_full(error):
                raise
            raise disk_full(self._outbox) from None

    def _append(self, record: dict[str, Any]) -> None:
        waits = False
        while True:
            try:
                self._spool.append(record)
                break
            except SpoolFull:
                if not waits:
                    why = self._courier.complaint or "it is slow"
                    tell(f"{self._outbox} is full of what MLflow has not taken ({why}): this job waits until it does")
                waits = True
                self._courier.hurry()
                self._courier.keep_alive()
                time.sleep(0.1)
        if waits:
            tell("there is room again: this job goes on")


class TrackedRun:
    """One MLflow run. What is said returns at once; it waits only where the outbox is full.

    Raises:
        StorageError: of every method, where the disk of the outbox is full.
    """

    def __init__(self, tracker: Tracker, key: str) -> None:
        self._tracker = tracker
        self.key = key

    def log(self, metrics: Mapping[str, float], step: int, at: float | None = None) -> None:
        """Metrics of a step. Of each metric, a step at or before its last one is a run repeating itself: ignored.

        A value that is not finite is left out, and `diverged` is 1 in its place.

        Args:
            at: when it was, as a Unix time; now, where it is not given.
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if len(finite) < len(metrics):
            finite["diverged"] = 1.0
        self._tracker._say(self.key, "log", at, step=int(step), metrics=finite)

    def tag(self, **tags: str) -> None:
        self._tracker._say(self.key, "tag", tags={name: fitted(value, TAG_LENGTH) for name, value in tags.items()})

    def artifact(self, path: Path) -> None:
        """Upload a file or folder; it must stay where it is until it has arrived."""
        self._tracker._say(self.key, "artifact", path=str(path.absolute()))

    def register(self, alias: str, folder: Path) -> None:
        """A new version of the registered model `tiger`, and the alias moved to it."""
        self._tracker._say(self.key, "register", alias=alias, path=str(folder.absolute()))

    def finish(self, status: Status = "FINISHED") -> None:
        self._tracker._say(self.key, "finish", status=status)


def track(run: Run, tags: Mapping[str, str] | None = None) -> tuple[Tracker, TrackedRun]:
    """The tracker and the MLflow run of a job, tagged with what made it: code, spec, seed, and what the job adds."""
    spec = run.spec
    made_by = {"tiger.spec_hash": run.hash}
    commit = git_commit()
    if commit:
        made_by["mlflow.source.git.commit"] = commit
    tracker = Tracker(spec.tracking.uri, spec.tracking.experiment, run.folder, tags=made_by)
    own = {KIND: spec.kind, FOLDER: str(run.folder.absolute()), HOST: socket.gethostname()}
    params = flat(spec.model_dump(mode="json", exclude={"kind", "name", "storage", "tracking"}))
    seed = params.get("seed", params.get("train.seed"))
    if seed is not None:
        own["tiger.seed"] = str(seed)
    parent = spec.tracking.parent
    return tracker, tracker.run(spec.name, params=params, tags=own | dict(tags or {}), parent=parent)


@contextmanager
def tracked(run: Run, tags: Mapping[str, str] | None = None) -> Iterator[tuple[Tracker, TrackedRun]]:
    """The tracker and the MLflow run of a job while its body runs; MLflow hears how that ended."""
    tracker, its_run = track(run, tags)
    try:
        yield tracker, its_run
        its_run.finish()
    except BaseException as error:
        with suppress(StorageError):  # a full disk takes not even that; what failed is said either way
            its_run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    finally:
        tracker.close()


def deliver_leftovers(run: Run, timeout_s: float = 20.0) -> None:
    """Deliver what a finished job could not: its tracking server was down when it ended."""
    outbox = run.folder / OUTBOX
    if outbox.exists() and backlog(outbox):
        Tracker(run.spec.tracking.uri, run.spec.tracking.experiment, run.folder).close(timeout_s)


def git_commit() -> str:
    """The commit of the working directory, with `-dirty` where files differ from it; "" outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def _job_of(folder: Path) -> tuple[str, bool]:
    """Tells this run apart from another of the same name that was replaced or made elsewhere; whether it is new."""
    path = folder / "tracking.json"
    kept = read_json(path, None)
    if kept is not None:
        return kept["nonce"], False
    made = uuid.uuid4().hex[:12]
    write_json(path, {"nonce": made})
    return made, True


def _plain(key: str) -> str:
    """A key that can stand between quotes in a query."""
    return key if re.fullmatch(r"[\w .:/=+-]{1,200}", key) else sha256(key.encode()).hexdigest()[:20]


def _absolute(uri: str) -> str:
    file = uri.removeprefix("sqlite:///")
    return uri if file == uri else f"sqlite:///{Path(file).absolute()}"
