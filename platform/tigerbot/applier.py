"""Tells MLflow what runs said: each run once, each metric point once, however often a batch is repeated.

MLflow chooses run ids, so a run carries its key as a tag and is looked up before it is made. A point is sent when its
step lies behind the last one of its metric; MLflow keeps those steps, so that this holds across processes. A point
that was sent and not confirmed is sent again bit for bit, which MLflow ignores. Used by one thread of one process a
job: of two that make the same run, both would succeed.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tigerbot.batches import Chunk, Key, Record, Said, chunks, gathered, new_points
from tigerbot.errors import TrackingError, first_line
from tigerbot.mlflow_client import FOLDER
from tigerbot.mlflow_server import TrackingServer, serve_tracking, version_warning
from tigerbot.registry import register
from tigerbot.spool import has_writer

KEY, HOST = "tiger.key", "tiger.host"  # tags
OUTBOX = "tracking.outbox"
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
_PARENT_PATIENCE_S = 60.0
_LATE_S = 60.0  # in which a server may still carry out what a dead process asked for
_PAGE = 500


@dataclass
class _Run:
    """An open run, as MLflow has it. `steps`: the last one of each metric."""

    id: str
    params: set[str] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)


class Applier:
    """Applies batches of records to a server.

    Args:
        job: what the keys of this job's runs begin with.
        fresh: nothing of this job was ever delivered, so its runs need not be looked for.
        refused: a file that takes what MLflow will never take.
        say: takes one line for the user.
    """

    def __init__(
        self, uri: str, experiment: str, job: str, *, fresh: bool, refused: Path, say: Callable[[str], None]
    ) -> None:
        self._uri, self._experiment, self._job = uri, experiment, job
        self._fresh, self._refused, self._say = fresh, refused, say
        self._began = time.monotonic()
        self._server: TrackingServer | None = None
        self._api: Any = None
        self._experiment_id = ""
        self._acquainted = False
        self._open: dict[Key, _Run] = {}
        self._made: set[int] = set()  # hashes of keys that may exist; a wrong one costs a look-up
        self._unsure: set[Key] = set()  # a run of this key may yet appear beside the one that is known

    def apply(self, records: list[Record]) -> None:
        """Tell MLflow. Raises whatever went wrong; then the whole batch has to be applied again."""
        runs, registered = gathered(records)
        self._connect()
        for key, said in runs.items():
            self._unless_refused({"run": key, "said": repr(said)}, lambda key=key, said=said: self._tell(key, said))
        for record in registered:
            self._unless_refused(record, lambda record=record: self._register(record))
        for key, said in runs.items():
            if said.end is not None:
                self._open.pop(key, None)

    def end_open_runs(self, job: str = "") -> None:
        """Runs of a job whose process is gone did not finish: KILLED."""
        self._connect()
        for run in list(self._search(f"tags.`{KEY}` LIKE '{job or self._job}/%' and attributes.status = 'RUNNING'")):
            self._api.set_terminated(run.info.run_id, "KILLED", int(time.time() * 1000))

    @property
    def connected(self) -> bool:
        """Whether a server ever answered."""
        return self._acquainted

    def disconnect(self) -> None:
        """Look for the server again before the next call."""
        self._api = None

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _connect(self) -> None:
        if self._api is not None:
            return
        from mlflow import MlflowClient

        found = serve_tracking(self._uri)
        # A server that this process started stays its own, also when it is found again by its address.
        if self._server is None or found.url != self._server.url:
            self._server = found
        self._api = MlflowClient(found.url)
        self._experiment_id = _experiment_id(self._api, self._experiment)
        if not self._acquainted:
            self._look_round(found.url)
            self._acquainted = True

    def _look_round(self, url: str) -> None:
        """What is there already: another version of MLflow, runs of this job, runs that nobody will ever end."""
        warning = version_warning(url)
        if warning:
            self._say(warning)
        if not self._fresh:
            self._made |= {hash(run.data.tags[KEY]) for run in self._search(f"tags.`{KEY}` LIKE '{self._job}/%'")}
        of_this_machine = f"tags.`{HOST}` = '{socket.gethostname()}' and attributes.status = 'RUNNING'"
        for run in list(self._search(of_this_machine)):
            job, outbox = run.data.tags[KEY].partition("/")[0], Path(run.data.tags.get(FOLDER, "")) / OUTBOX
            if job != self._job and outbox.exists() and not has_writer(outbox):
                self.end_open_runs(job)

    def _search(self, query: str) -> Iterator[Any]:
        token = None
        while True:
            order = ["attributes.start_time ASC"]  # pages are offsets: what is new must come last
            page = self._api.search_runs(
                [self._experiment_id], query, max_results=_PAGE, order_by=order, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _tell(self, key: Key, said: Said) -> None:
        run = self._run(key, said.start)
        params = {name: value for name, value in said.params.items() if name not in run.params}
        for chunk in chunks(params, new_points(said.points, run.steps), said.tags):
            self._log(key, run, chunk)
        for path in said.artifacts:
            self._upload(key, run, Path(path))
        if said.end is not None:
            self._api.set_terminated(run.id, said.end["status"], said.end["at"])
            if key in self._unsure:
                self._find(key, keep=run.id)
                self._unsure.discard(key)

    def _run(self, key: Key, start: Record | None = None) -> _Run:
        """The run of a key: known, found, or made where it is started."""
        if key in self._open:
            return self._open[key]
        found = self._find(key) if start is None or hash(key) in self._made else None
        if found is None:
            if start is None:
                raise _Gone(f"there is no run {key}: was it deleted?")
            self._open[key] = _Run(self._make(key, start))
            return self._open[key]
        if start is not None and found.info.status != "RUNNING":
            self._api.update_run(found.info.run_id, "RUNNING")
        steps = {metric.key: metric.step for metric in found.data.to_proto().metrics}
        self._open[key] = _Run(found.info.run_id, set(found.data.params), steps)
        return self._open[key]

    def _find(self, key: Key, keep: str = "") -> Any:
        """The run of a key, if there is one; a double, made by a request whose answer was lost, is deleted."""
        found = list(self._api.search_runs([self._experiment_id], f"tags.`{KEY}` = '{key}'", max_results=10))
        found.sort(key=lambda run: (run.info.run_id != keep, -len(run.data.metrics), run.info.run_id))
        for double in found[1:]:
            self._api.delete_run(double.info.run_id)
        return found[0] if found else None

    def _make(self, key: Key, start: Record) -> str:
        tags = start["tags"] | {KEY: key}
        parent = self._parent(start["parent"]) if start["parent"] else ""
        if parent:
            tags["mlflow.parentRunId"] = parent
        self._made.add(hash(key))
        try:
            made = self._api.create_run(self._experiment_id, start["at"], tags, run_name=start["name"])
        except Exception:
            self._unsure.add(key)
            raise
        if not self._fresh and time.monotonic() - self._began < _LATE_S:
            self._unsure.add(key)
        return made.info.run_id

    def _parent(self, key: Key) -> str:
        """The id of a parent; another process's is waited for, a while."""
        try:
            return self._run(key).id
        except _Gone:
            if time.monotonic() - self._began > _PARENT_PATIENCE_S:
                return ""
            raise TrackingError(f"the parent run {key} has not arrived yet", where=self._uri) from None

    def _log(self, key: Key, run: _Run, chunk: Chunk) -> None:
        """Send entities; where one of them is refused, all others."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        params = [Param(name, value) for name, value in chunk.params]
        metrics = [Metric(*point) for point in chunk.points]
        tags = [RunTag(name, value) for name, value in chunk.tags]
        try:
            self._api.log_batch(run.id, metrics, params, tags)
        except MlflowException as error:
            if not _is_refusal(error) or self._api.get_run(run.id).info.lifecycle_stage != "active":
                raise
            if len(chunk) > 1:
                for half in chunk.halves():
                    self._log(key, run, half)
                return
            self._refuse({"run": key, "said": repr(chunk)}, error)
        run.params |= {name for name, _ in chunk.params}
        run.steps |= {point.name: point.step for point in chunk.points}

    def _upload(self, key: Key, run: _Run, path: Path) -> None:
        if not path.exists():
            self._refuse({"run": key, "artifact": str(path)}, FileNotFoundError(f"{path} is not there any more"))
        elif path.is_dir():
            self._api.log_artifacts(run.id, str(path), path.name)
        else:
            self._api.log_artifact(run.id, str(path))

    def _register(self, record: Record) -> None:
        register(self._api, self._run(record["run"]).id, record["path"], record["alias"], record["at"])

    def _unless_refused(self, what: Record, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:
            if not _is_refusal(error):
                raise
            self._refuse(what, error)

    def _refuse(self, what: Record, error: BaseException) -> None:
        """MLflow will never take this: say so, keep it, and go on with the rest."""
        with self._refused.open("a", encoding="utf-8") as file:
            file.write(json.dumps(what | {"why": str(error)}, ensure_ascii=False) + "\n")
        self._say(f"MLflow refuses a part of {what['run']} ({first_line(error)}); it is kept in {self._refused}")


class _Gone(Exception):
    """A run that MLflow does not have."""


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, _Gone) or getattr(error, "error_code", "") in _REFUSALS


def _experiment_id(api: Any, name: str) -> str:
    """The experiment of this name, made if there is none."""
    from mlflow.exceptions import MlflowException

    experiment = api.get_experiment_by_name(name)
    if experiment is None:
        try:
            return api.create_experiment(name)
        except MlflowException:  # another process was first
            experiment = api.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError("was deleted in MLflow", where=f"experiment {name}", fix="restore it, or name another")
    return experiment.experiment_id
