"""`kind: sweep`: Tune runs the trials, Optuna proposes them, the ledger remembers them, MLflow shows them."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tigerbot.cluster import connect
from tigerbot.errors import IdentityError, TigerError
from tigerbot.progress import Stage, stage
from tigerbot.runs import Run, read_json, write_json
from tigerbot.spec import SweepSpec
from tigerbot.tracking import TrackedRun, Tracker, tracked
from tigerbot_jobs.sweep.ledger import Entry, Ledger
from tigerbot_jobs.sweep.space import grid_points, tune_space
from tigerbot_jobs.sweep.target import Target, load_target

# Tune's own loggers write three files a trial and slow its loop; MLflow and the ledger hold everything.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# It would take Ctrl-C for an ordinary end of the trials; the ledger keeps what a restart needs.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables ignore `verbose=0`; progress is ours
# It looks for the files of the loggers that are off, and complains of every trial.
logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


def run(run: Run) -> dict[str, Any]:
    """Run the trials that have not ended; the result names the best parameters and every trial."""
    spec = run.spec
    assert isinstance(spec, SweepSpec)
    tune_space(spec.space)
    threads = max(1, (os.cpu_count() or 1) // spec.max_concurrent)
    target, target_hash = load_target(spec.target, spec.params, threads=threads)
    _check_target(run, target_hash)
    with ExitStack() as stack:
        tracker, parent = stack.enter_context(tracked(run))
        ledger = stack.enter_context(closing(Ledger(run.folder / "trials.jsonl")))
        stack.callback(connect(None, num_cpus=max(os.cpu_count() or 1, spec.max_concurrent)).stop)
        with stage(f"sweep {spec.name}", total=spec.trials, unit="trials") as shown:
            shown.update(len(ledger.ended))
            _run_trials(run, spec, target, ledger, _Follow(spec, ledger, tracker, parent, shown))
        result = _result(spec, ledger)
        parent.log({f"best_{spec.metric}": result["metric"]}, step=len(ledger.ended))
        parent.tag(**{f"best.{name}": str(value) for name, value in result["params"].items()})
    print(f"  best {spec.metric} {result['metric']:.4f} with {result['params']}")
    return run.finish(result)


def _check_target(run: Run, target_hash: str) -> None:
    """A sweep whose target changed under it is another sweep."""
    kept = read_json(run.folder / "target.json", None)
    if kept is not None and kept["hash"] != target_hash:
        raise IdentityError("its target has changed", where=str(run.folder), fix="--replace to begin anew")
    write_json(run.folder / "target.json", {"hash": target_hash})


def _run_trials(run: Run, spec: SweepSpec, target: Target, ledger: Ledger, follow: _Follow) -> None:
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    left = spec.trials - len(ledger.ended)
    if left <= 0:
        return

    def trial(params: dict[str, Any]) -> None:
        # Optuna wants the metric in every report, and the held-out loss comes more seldom than the training loss.
        target(params, lambda metrics: tune.report(metrics) if spec.metric in metrics else None)

    tuner = Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        tune_config=TuneConfig(
            search_alg=_searcher(spec, ledger),
            scheduler=_scheduler(spec),
            num_samples=left,
            max_concurrent_trials=spec.max_concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run.folder.absolute()),
            callbacks=[follow.callback()],
            failure_config=FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    tuner.fit()


def _searcher(spec: SweepSpec, ledger: Ledger) -> Any:
    """Optuna, told what has ended and handed what was cut short.

    A sampler draws from (seed, trials ended), so that a resumed sweep does not draw its first points again.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = spec.seed + len(ledger.ended)
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(4, spec.trials // 3))),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda: optuna.samplers.GridSampler(grid_points(spec.space), seed=spec.seed),
    }
    searcher = OptunaSearch(
        OptunaSearch.convert_search_space(tune_space(spec.space)),
        metric=spec.metric,
        mode=spec.mode,
        points_to_evaluate=[entry.params for entry in ledger.cut_short] or None,
        sampler=samplers[spec.searcher](),
    )
    for entry in ledger.ended:
        if entry.metric is not None:
            searcher.add_evaluated_point(entry.params, entry.metric)
    return searcher


def _scheduler(spec: SweepSpec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if spec.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(metric=spec.metric, mode=spec.mode, grace_period=1, reduction_factor=3)


class _Follow:
    """Carries what Tune says to the ledger, to MLflow and to the terminal."""

    def __init__(self, spec: SweepSpec, ledger: Ledger, tracker: Tracker, parent: TrackedRun, shown: Stage) -> None:
        self._spec, self._ledger, self._tracker = spec, ledger, tracker
        self._parent, self._shown = parent, shown
        self._begun: dict[str, tuple[Entry, TrackedRun]] = {}

    def __reduce__(self) -> tuple:
        # Tune pickles its callbacks for `Tuner.restore`, which we do not use: the ledger is what a sweep resumes from.
        return object, ()

    def callback(self) -> Any:
        from ray.tune import Callback

        follow = self

        class ToLedger(Callback):
            def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                follow.begin(trial)

            def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
                follow.report(trial, result)

            def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                follow.end(trial, "")

            def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                follow.end(trial, _last_line(trial) or "failed")

        return ToLedger()

    def begin(self, trial: Any) -> None:
        if trial.trial_id in self._begun:
            return  # a retry of the same trial
        entry = self._ledger.begin(trial.config)
        run = self._tracker.run(
            f"{self._spec.name}-{entry.name}", params=entry.params, tags={"tiger.kind": "trial"}, parent=self._parent
        )
        self._begun[trial.trial_id] = (entry, run)

    def report(self, trial: Any, result: dict[str, Any]) -> None:
        _, run = self._begun[trial.trial_id]
        step = int(result.get("step", result["training_iteration"]))
        noise = {"step", "training_iteration", "time_this_iter_s", "time_total_s", "timestamp", "pid"}
        noise |= {"time_since_restore", "iterations_since_restore"}
        metrics = {k: v for k, v in result.items() if isinstance(v, int | float) and k not in noise}
        run.log({k: float(v) for k, v in metrics.items() if not isinstance(v, bool)}, step=step)

    def end(self, trial: Any, error: str) -> None:
        entry, run = self._begun[trial.trial_id]
        metric = (trial.last_result or {}).get(self._spec.metric)
        self._ledger.end(entry.name, metric=metric, error=error)
        run.finish("FAILED" if error else "FINISHED")
        done = [e.metric for e in self._ledger.ended if e.metric is not None]
        best = (min if self._spec.mode == "min" else max)(done, default=None)
        self._shown.update(len(self._ledger.ended), "" if best is None else f"best {self._spec.metric} {best:.4f}")


def _last_line(trial: Any) -> str:
    if not trial.error_file or not Path(trial.error_file).exists():
        return ""
    lines = [line for line in Path(trial.error_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _result(spec: SweepSpec, ledger: Ledger) -> dict[str, Any]:
    done = [entry for entry in ledger.ended if entry.metric is not None and not entry.error]
    if not done:
        first = next((entry.error for entry in ledger.ended if entry.error), "no trial reported the metric")
        raise TigerError(
            f"every trial failed: {first}", where=spec.name, fix=f"does the target report {spec.metric}? run one alone"
        )
    best = (min if spec.mode == "min" else max)(done, key=lambda entry: entry.metric or 0.0)
    return {
        "params": best.params,
        "metric": best.metric,
        "best": best.name,
        "trials": [vars(entry) for entry in ledger.entries.values()],
    }
