"""Heavy trials: each a fault-tolerant training run under a hub of its own, the same code as `kind: train`.

The trial's process holds the run's hub and is used again by the next trial, and so are its workers: what they have
imported and connected is there already. The run lives in `<sweep>/trials/<trial>`; a trial that begins again resumes
from its checkpoint there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tigerbot.errors import IdentityError
from tigerbot.runs import Run, open_run
from tigerbot.spec import Scale, TrainSpec, spec_hash
from tigerbot_jobs.sweep.checkpoints import Checkpoints, taken_step
from tigerbot_jobs.sweep.target import changed, halved, seeded
from tigerbot_jobs.sweep.trials import Trial
from tigerbot_jobs.sweep.worker import Report, Stopped

if TYPE_CHECKING:
    from tigerbot_jobs.train.metrics import Row
    from tigerbot_jobs.train.recovery.standing import Standing

METRICS = "metrics.jsonl"
WORKERS = "ray"  # below the sweep's folder: what Ray Train writes of the workers that go from trial to trial
_LOOK_S = 0.2


class HeavyTarget:
    """Args:
    path: of the train spec. `folder` is the sweep's.
    interval: steps between two comparisons of a population's member, if it is one: it keeps a checkpoint at each.
    """

    def __init__(self, path: str, fixed: dict[str, Any], folder: Path, *, interval: int | None = None) -> None:
        self._path, self._fixed, self._folder, self._interval = path, fixed, folder, interval
        spec = changed(path, fixed)
        self.hash = spec_hash(spec)
        uri = spec.storage.uri if "://" in spec.storage.uri else str(folder)
        self._uri = f"{uri.rstrip('/')}/trials"
        self.checkpoints = Checkpoints(self._uri)
        self._standing: Standing | None = None  # made in the trial's process
        self._kept = -1  # the step of this trial's newest checkpoint

    def __call__(self, params: Mapping[str, Any], report: Report) -> None:
        run = self._opened(self._spec(report.name, params, report.seed))
        try:
            if run.done:
                for row in _logged(run):  # a driver that died may not have heard the last ones
                    report(row)
            else:
                self._train(run, report)
                run.finish({})
        finally:
            run.close()

    def shrunk(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return halved(self._path, self._fixed, params)

    def forget_memory(self, trials: Iterable[Trial]) -> None:
        """Remove what trials that were killed left in this machine's shared memory."""
        from tigerbot_jobs.train.recovery.run import forget_memory

        for trial in trials:
            spec = self._spec(trial.name, trial.params | trial.changes, trial.seed)
            forget_memory(spec, spec_hash(spec))

    def _spec(self, name: str, params: Mapping[str, Any], seed: int) -> TrainSpec:
        spec = seeded(changed(self._path, {**self._fixed, **params}), seed)
        storage = spec.storage.model_copy(update={"uri": self._uri})
        about = {"name": name, "storage": storage, "scale": trial_scale(spec), "register_as": None}
        if self._interval is not None:
            every = {"checkpoint_every_steps": self._interval}
            about["fault_tolerance"] = spec.fault_tolerance.model_copy(update=every)
        return spec.model_copy(update=about)

    def _opened(self, spec: TrainSpec) -> Run:
        """The trial's run: to begin, to resume, or to go on as another from a state that it took over or had itself."""
        if (run := self.checkpoints.opened(spec, keep=False)) is not None:
            return run
        try:
            return open_run(spec)
        except IdentityError as error:
            if "another spec" not in error.what:
                raise
            return self.checkpoints.opened(spec, keep=True) or open_run(spec, replace=True)

    def _train(self, run: Run, report: Report) -> None:
        """Rows come from the hub's thread; the trial's own reports them, and may have to wait for an answer."""
        from tigerbot_jobs.train.job import train_until
        from tigerbot_jobs.train.metrics import append_row

        told, self._kept, standing = taken_step(run), -1, self._workers()
        rows: queue.Queue[Any] = queue.Queue()
        for row in _logged(run):  # by an earlier attempt, and a driver that died may not have heard
            rows.put(row)
            told = int(row["step"])
        stop, failed = threading.Event(), list[BaseException]()

        def on_row(row: Any) -> None:
            nonlocal told
            if row["step"] > told:  # after a restore the run says its last rows again
                told = int(row["step"])
                append_row(run.folder / METRICS, row)
                rows.put(row)

        def train() -> None:
            try:
                train_until(run, on_row, stop, standing)
            except BaseException as error:  # raised again in the trial's thread
                failed.append(error)

        trainer = threading.Thread(target=train, daemon=True, name=f"{run.spec.name}-train")
        trainer.start()
        try:
            while trainer.is_alive() or not rows.empty():
                try:
                    row = rows.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                if not self._has_state(run, int(row["step"]), trainer):
                    break
                report(row)
        except Stopped:
            stop.set()
            trainer.join()
            raise
        if failed:
            standing.close()  # whatever has gone wrong in them, the next trial has others
            raise failed[0]

    def _has_state(self, run: Run, step: int, trainer: threading.Thread) -> bool:
        """Wait for a checkpoint of this step: a population hears of nothing that could not be taken over."""
        while self._interval is not None and self._kept < step:
            over = not trainer.is_alive()
            self._kept = self.checkpoints.kept_step(run.spec.name)
            if over and self._kept < step:
                return False
            time.sleep(0 if self._kept >= step else _LOOK_S)
        return True

    def _workers(self) -> Standing:
        if self._standing is None:
            from tigerbot_jobs.train.job import own_node_address
            from tigerbot_jobs.train.recovery.standing import Standing

            self._standing = Standing(self._folder / WORKERS, own_node_address())
        return self._standing


def _logged(run: Run) -> list[Row]:
    from tigerbot_jobs.train.metrics import read_rows

    log = run.folder / METRICS
    return read_rows(log) if log.exists() else []


def trial_scale(spec: TrainSpec) -> Scale:
    """Of one trial among others: a standby nobody asked for would take the place of a trial."""
    standbys = spec.scale.standbys
    return spec.scale.model_copy(update={"standbys": 0 if standbys == "auto" else standbys})


def trial_size(spec: TrainSpec) -> tuple[float, float]:
    """CPUs and GPUs of one trial."""
    scale = trial_scale(spec)
    workers = scale.bounds[1] + (scale.standbys if isinstance(scale.standbys, int) else 0)
    return workers * scale.cpus_per_worker, workers * scale.gpus_per_worker
