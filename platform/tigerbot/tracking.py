"""One way to reach MLflow: runs, batched metrics, registry aliases, exactly once, and never in the way.

What a job says goes to an outbox on its own disk and returns at once. A thread delivers it: a dead server delays it,
a dead process leaves it for the next one, and every delivery can be repeated without doubling anything (runs are found
by a tag before they are created; MLflow ignores a metric row whose step, timestamp and value it already holds, and the
outbox keeps all three).
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tigerbot.errors import TrackingError, first_line
from tigerbot.mlflow_server import TrackingServer, serve_tracking
from tigerbot.outbox import Outbox
from tigerbot.runs import read_json, write_json
from tigerbot.spec import flat

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
REGISTERED_MODEL = "tiger"
_KEY = "tiger.key"
_BATCH = 500  # records a delivery: MLflow takes 1,000 metrics a call, and one record holds several


class Tracker:
    """Runs of one experiment, delivered by one thread.

    Args:
        uri: `sqlite:///file` (a local server is started, and started again if it dies) or `http(s)://server`.
        experiment: its name; made if there is none.
        folder: holds the outbox, `tracking.jsonl`; what an earlier process left there is delivered too.
    """

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self._uri = uri
        self._experiment = experiment
        self._outbox = Outbox(folder / "tracking.jsonl")
        self._nonce = _nonce(folder)
        self._last_step: dict[str, int] = {}
        self._begun: set[str] = set()
        for record in self._outbox.records():
            self._remember(record)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._complaint = ""
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="tracking")
        self._thread.start()

    def run(
        self,
        name: str,
        *,
        key: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: TrackedRun | None = None,
    ) -> TrackedRun:
        """The run of this name (or key, where names repeat), begun or continued."""
        tracked = TrackedRun(self, f"{self._nonce}/{key or name}")
        if tracked.key not in self._begun:
            self._say(
                tracked.key,
                "start",
                name=name,
                params={k: str(v)[:6000] for k, v in (params or {}).items()},
                tags=dict(tags or {}),
                parent=parent.key if parent else "",
            )
        else:
            self._say(tracked.key, "continue")
        return tracked

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything said so far has arrived; whether it has."""
        until = time.monotonic() + timeout_s
        while not self._outbox.empty and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.05)
        return self._outbox.empty

    def close(self, timeout_s: float = 30.0) -> bool:
        """Deliver what is left and stop; whether everything arrived. What did not stays for the next time."""
        arrived = self.flush(timeout_s)
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=15)
        self._outbox.close()
        if not arrived:
            print(
                f"  MLflow has not taken everything ({self._complaint or 'slow'}); the rest waits in {self._outbox.path}",
                file=sys.stderr,
                flush=True,
            )
        return arrived

    def _say(self, key: str, op: str, **fields: Any) -> None:
        record = {"run": key, "op": op, "at": int(time.time() * 1000)} | fields
        self._remember(record)
        self._outbox.append(record)
        self._wake.set()

    def _remember(self, record: dict[str, Any]) -> None:
        if record["op"] == "start":
            self._begun.add(record["run"])
        elif record["op"] == "log":
            self._last_step[record["run"]] = max(record["step"], self._last_step.get(record["run"], -1))

    def _deliver(self) -> None:
        """The thread: apply what waits; on failure say so once, wait, and try again."""
        applier = _Applier(self._uri, self._experiment)
        wait = 0.5
        while not self._closing.is_set():
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            try:
                while not self._closing.is_set() and not self._outbox.empty:
                    records, end = self._outbox.waiting(_BATCH)
                    applier.apply(records)
                    self._outbox.arrived(end)
                    self._complaint, wait = "", 0.5
            except Exception as error:  # any failure of a server or client must not end delivery
                applier.forget_server()
                if not self._complaint:
                    print(f"  MLflow does not answer; metrics wait on disk ({first_line(error)})", file=sys.stderr)
                self._complaint = first_line(error)
                self._closing.wait(wait * random.uniform(0.5, 1.0))
                self._wake.set()
                wait = min(2 * wait, 15.0)
        applier.stop()


class TrackedRun:
    """One MLflow run. Nothing here blocks or fails: it is written to the outbox."""

    def __init__(self, tracker: Tracker, key: str) -> None:
        self._tracker = tracker
        self.key = key

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of a step. A step at or before the last one logged is a resumed run repeating itself: ignored.

        A value that is not finite is left out, and `diverged` is 1 in its place.
        """
        if step <= self._tracker._last_step.get(self.key, -1):
            return
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if len(finite) < len(metrics):
            finite["diverged"] = 1.0
        self._tracker._say(self.key, "log", step=step, metrics=finite)

    def tag(self, **tags: str) -> None:
        self._tracker._say(self.key, "tag", tags=tags)

    def artifact(self, path: Path) -> None:
        """Upload a file; it must stay where it is until it has arrived."""
        self._tracker._say(self.key, "artifact", path=str(path.absolute()))

    def register(self, alias: str, folder: Path) -> None:
        """A new version of the registered model `tiger`, and the alias moved to it."""
        self._tracker._say(self.key, "register", alias=alias, path=str(folder.absolute()))

    def finish(self, status: Status = "FINISHED") -> None:
        self._tracker._say(self.key, "finish", status=status)


def track(run: Run) -> tuple[Tracker, TrackedRun]:
    """The tracker and the MLflow run of a job, tagged with what made it."""
    spec = run.spec
    tracker = Tracker(spec.tracking.uri, spec.tracking.experiment, run.folder)
    tags = {"tiger.kind": spec.kind, "tiger.spec_hash": run.hash, "tiger.folder": str(run.folder.absolute())}
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    params = flat(spec.model_dump(mode="json", exclude={"kind", "name", "storage", "tracking"}))
    return tracker, tracker.run(spec.name, params=params, tags=tags)


@contextmanager
def tracked(run: Run) -> Iterator[tuple[Tracker, TrackedRun]]:
    """The tracker and the MLflow run of a job while its body runs; MLflow hears how that ended."""
    tracker, its_run = track(run)
    try:
        yield tracker, its_run
        its_run.finish()
    except Exception:
        its_run.finish("FAILED")
        raise
    except (KeyboardInterrupt, SystemExit):
        its_run.finish("KILLED")
        raise
    finally:
        tracker.close()


def deliver_leftovers(run: Run, timeout_s: float = 20.0) -> None:
    """Deliver what a finished job could not: its tracking server was down when it ended."""
    outbox = Outbox(run.folder / "tracking.jsonl") if (run.folder / "tracking.jsonl").exists() else None
    if outbox is None:
        return
    empty = outbox.empty
    outbox.close()
    if not empty:
        Tracker(run.spec.tracking.uri, run.spec.tracking.experiment, run.folder).close(timeout_s)


def resolve_alias(uri: str, alias: str) -> Path:
    """The folder of the model an alias points at.

    Raises:
        TrackingError: no model has this alias.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = serve_tracking(uri)
    try:
        version = MlflowClient(server.url).get_model_version_by_alias(REGISTERED_MODEL, alias)
    except MlflowException as error:
        raise TrackingError(
            f"no model has the alias {alias!r} ({first_line(error)})", where=uri, fix="register one"
        ) from None
    finally:
        server.stop()
    return Path(version.tags["tiger.folder"])


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


class _Applier:
    """Applies records to a server, each of them idempotently. Used by one thread."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri = uri
        self._experiment = experiment
        self._server: TrackingServer | None = None
        self._api: Any = None
        self._experiment_id = ""
        self._ids: dict[str, str] = {}

    def apply(self, records: list[dict[str, Any]]) -> None:
        self._connect()
        pending: dict[str, list[Any]] = {}
        for record in records:
            if record["op"] == "log":
                pending.setdefault(record["run"], []).extend(self._points(record))
                continue
            self._log(record["run"], pending.pop(record["run"], []))
            self._ops[record["op"]](record)
        for key, points in pending.items():
            self._log(key, points)

    def forget_server(self) -> None:
        self._api = None

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    @property
    def _ops(self) -> dict[str, Callable[[dict[str, Any]], None]]:
        return {
            "start": self._start,
            "continue": lambda r: self._api.update_run(self._id(r["run"]), status="RUNNING"),
            "tag": lambda r: self._tags(self._id(r["run"]), r["tags"]),
            "artifact": lambda r: self._api.log_artifact(self._id(r["run"]), r["path"]),
            "register": self._register,
            "finish": lambda r: self._api.set_terminated(self._id(r["run"]), r["status"], r["at"]),
        }

    def _connect(self) -> None:
        if self._api is not None:
            return
        # Our own retries are the patient ones; MLflow's would block this thread for minutes before it can say so.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        found = serve_tracking(self._uri)
        # A server that this process started stays its own, also when it is found again by its address.
        if self._server is None or found.url != self._server.url:
            self._server = found
        api = MlflowClient(found.url)
        experiment = api.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                self._experiment_id = api.create_experiment(self._experiment)
            except MlflowException:  # another process was first
                experiment = api.get_experiment_by_name(self._experiment)
        if experiment is not None:
            self._experiment_id = experiment.experiment_id
        self._api = api

    def _id(self, key: str) -> str:
        if key not in self._ids:
            found = self._api.search_runs([self._experiment_id], f"tags.`{_KEY}` = '{key}'", max_results=1)
            if not found:
                raise TrackingError(f"the run {key} is gone from MLflow", where=self._uri)
            self._ids[key] = found[0].info.run_id
        return self._ids[key]

    def _start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        key = record["run"]
        try:
            run_id = self._id(key)
        except TrackingError:
            tags = record["tags"] | {_KEY: key}
            if record["parent"]:
                tags["mlflow.parentRunId"] = self._id(record["parent"])
            run = self._api.create_run(self._experiment_id, record["at"], tags, run_name=record["name"])
            run_id = self._ids[key] = run.info.run_id
        params = [Param(name, value) for name, value in record["params"].items()]
        for at in range(0, len(params), 100):
            self._api.log_batch(run_id, params=params[at : at + 100])

    def _points(self, record: dict[str, Any]) -> list[Any]:
        from mlflow.entities import Metric

        return [Metric(name, value, record["at"], record["step"]) for name, value in record["metrics"].items()]

    def _log(self, key: str, points: list[Any]) -> None:
        for at in range(0, len(points), 1000):
            self._api.log_batch(self._id(key), metrics=points[at : at + 1000])

    def _tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._api.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def _register(self, record: dict[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        run_id = self._id(record["run"])
        try:
            self._api.create_registered_model(REGISTERED_MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._api.search_model_versions(f"name='{REGISTERED_MODEL}' and run_id='{run_id}'")
        version = next((v for v in made if v.tags.get("tiger.folder") == record["path"]), None)
        if version is None:
            # The weights stay where the run wrote them: the version points there by tag.
            version = self._api.create_model_version(
                REGISTERED_MODEL,
                f"runs:/{run_id}/model",
                run_id,
                tags={"tiger.folder": record["path"]},
                await_creation_for=0,
            )
        self._api.set_registered_model_alias(REGISTERED_MODEL, record["alias"], version.version)


def _nonce(folder: Path) -> str:
    """Tells this run apart from another of the same name that was replaced or made elsewhere."""
    path = folder / "tracking.json"
    kept = read_json(path, None)
    if kept is None:
        kept = {"nonce": uuid.uuid4().hex[:12]}
        write_json(path, kept)
    return kept["nonce"]
