"""`kind: sweep`: check everything that can be checked, then one driver until nothing is left; MLflow shows the trials."""

from __future__ import annotations

import math
import os
import shutil
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tigerbot.cluster import connect
from tigerbot.errors import IdentityError, TigerError
from tigerbot.notify import notify
from tigerbot.progress import stage
from tigerbot.runs import Run, read_json, write_json
from tigerbot.spec import SweepSpec
from tigerbot.tokens import manifests_hash
from tigerbot.tracking import TrackedRun, git_commit, tracked
from tigerbot_jobs.sweep.course import Course, scheduler_of
from tigerbot_jobs.sweep.crew import Crew
from tigerbot_jobs.sweep.driver import Driver
from tigerbot_jobs.sweep.follow import Follow
from tigerbot_jobs.sweep.heavy import WORKERS, HeavyTarget, trial_size
from tigerbot_jobs.sweep.journal import JOURNAL, Journal
from tigerbot_jobs.sweep.page_line import Limits, Tally, note
from tigerbot_jobs.sweep.page_report import write_report
from tigerbot_jobs.sweep.priors import prior_lines
from tigerbot_jobs.sweep.ranking import confirmed, front, mean, ranked
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.states import States
from tigerbot_jobs.sweep.target import Target, changed, load_target
from tigerbot_jobs.sweep.trials import Trial
from tigerbot_jobs.sweep.warm import earlier_trials

_DELIVERY_S = 0.1  # a trial's rows, in MLflow over SQLite


def run(run: Run) -> dict[str, Any]:
    """Run the trials that have not ended; the result names the best parameters and every trial."""
    spec = run.spec
    assert isinstance(spec, SweepSpec)
    space = Space(spec.space)
    threads = max(1, (os.cpu_count() or 1) // spec.max_concurrent)
    target = load_target(spec, space, threads=threads, folder=run.folder.absolute())
    _check_target(run, target.hash)
    spec = _sized(spec)
    if spec.target.endswith((".yaml", ".yml")):
        for line in prior_lines(spec, changed(spec.target, spec.params)):
            print(f"  {line}", flush=True)
    with ExitStack() as stack:
        tracker, parent = stack.enter_context(tracked(run))
        journal = stack.enter_context(closing(Journal(run.folder)))
        earlier = earlier_trials(spec, space, run.folder)
        course = Course(spec, space, searcher_of(spec, space, earlier), scheduler_of(spec))
        stack.callback(connect(None, num_cpus=_local_cpus(spec), dashboard=spec.trial == "heavy").stop)
        tags = {"tiger.spec_hash": run.hash, "mlflow.source.git.commit": git_commit()} | _data_tags(spec)
        follow = Follow(spec, tracker, parent, {name: value for name, value in tags.items() if value})
        spent = _drive(run, spec, target, course, journal, follow, parent)
        result: dict[str, Any] = _result(spec, course) | {"spent": spent}
        parent.log({f"best_{spec.metric}": result["metric"]}, step=course.ended)
        parent.tag(**{f"best.{name}": str(value) for name, value in result["params"].items()})
        page = write_report(run.folder / JOURNAL, state="done")
        parent.artifact(page)
        tracker.flush(_DELIVERY_S * course.ended)  # light trials are quicker than MLflow takes them
    print(f"  best {spec.metric} {result['metric']:.4f} with {result['params']}\n  {page}")
    shutil.rmtree(run.folder / "states", ignore_errors=True)
    if isinstance(target, HeavyTarget):
        target.forget_memory(course.trials.values())
        shutil.rmtree(run.folder / WORKERS, ignore_errors=True)
    return run.finish(result)


def _drive(
    run: Run, spec: SweepSpec, target: Target, course: Course, journal: Journal, follow: Follow, parent: TrackedRun
) -> str:
    tally, limits = Tally(), Limits.of(spec.model_dump())
    with stage(f"sweep {spec.name}", total=_planned(spec), unit="trials") as shown:

        def show() -> None:
            if course.best is not None and course.best.metric is not None:
                parent.log({f"best_{spec.metric}": course.best.metric}, step=course.ended)
            shown.update(course.ended, note(tally.progress(), limits, time.time()))

        size = {"cpus": spec.cpus_per_trial, "gpus": spec.gpus_per_trial}
        crew = Crew(target, **size, within=spec.trial == "light", environment=_environment(spec))
        driver = Driver(
            spec,
            run.folder.absolute(),
            course=course,
            journal=journal,
            follow=follow,
            crew=crew,
            states=target.checkpoints if isinstance(target, HeavyTarget) else States(run.folder.absolute() / "states"),
            shrink=target.shrunk,
            listen=tally.take,
            on_end=show,
        )
        driver.restore()
        shown.update(course.ended)
        spent = driver.run()
    if spent:
        print(f"  the budget is spent ({spent}); --extend with a wider one goes on", flush=True)
        notify("budget spent", spec, spent)
    return spent


def _planned(spec: SweepSpec) -> int:
    return spec.trials + (spec.confirm.top * spec.confirm.seeds if spec.confirm else 0)


def _data_tags(spec: SweepSpec) -> dict[str, str]:
    """What a train target's trials learn from, where that is token shards already."""
    if not spec.target.endswith((".yaml", ".yml")):
        return {}
    folders = [Path(source.path) for source in changed(spec.target, spec.params).data.train]
    ready = all((folder / "manifest.json").is_file() for folder in folders)
    return {"tiger.data": manifests_hash(folders)} if ready else {}


def _check_target(run: Run, target_hash: str) -> None:
    """A sweep whose target changed under it is another sweep."""
    kept = read_json(run.folder / "target.json", None)
    if kept is not None and kept["hash"] != target_hash:
        raise IdentityError("its target has changed", where=str(run.folder), fix="--replace to begin anew")
    write_json(run.folder / "target.json", {"hash": target_hash})


def _local_cpus(spec: SweepSpec) -> int:
    """Logical CPUs of a cluster of this machine's own: all trials that may run at once have a slot."""
    return max(os.cpu_count() or 1, math.ceil(spec.max_concurrent * spec.cpus_per_trial - 1e-9))


def _sized(spec: SweepSpec) -> SweepSpec:
    """The spec with what one trial takes, and with the trials that there are."""
    if spec.searcher == "grid":
        points = len(Space(spec.space).grid(spec.params))
        spec = spec.model_copy(update={"trials": min(spec.trials, points * spec.seeds)})
    if spec.trial == "light":
        return spec
    cpus, gpus = trial_size(changed(spec.target, spec.params))
    return spec.model_copy(update={"cpus_per_trial": cpus, "gpus_per_trial": gpus})


def _environment(spec: SweepSpec) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // spec.max_concurrent)
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}


def _result(spec: SweepSpec, course: Course) -> dict[str, Any]:
    best = _best(spec, course)
    pareto = {"pareto": [trial.name for trial in front(course.trials.values(), spec)]} if spec.objectives else {}
    trials = [course.trials[name].as_result() for name in sorted(course.trials)]
    return {"params": best[0].params, "metric": mean(best), "best": best[0].name, **pareto, "trials": trials}


def _best(spec: SweepSpec, course: Course) -> list[Trial]:
    """The trials of the best configuration: of those that were confirmed by their fresh seeds alone, if any were.

    Raises:
        TigerError: no trial has a result.
    """
    trials = course.trials.values()
    if best := confirmed(trials, spec) or ranked(trials, spec):
        return best[0]
    errors = [trial.error for trial in trials if trial.error]
    first = errors[0] if errors else "none reported the metric"
    raise TigerError(
        f"every trial failed: {first}", where=spec.name, fix=f"does the target report {spec.metric}? run one alone"
    )
