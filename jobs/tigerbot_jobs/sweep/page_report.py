"""The report of a sweep: its page on disk, the same page in MLflow beside the parent run, a few lines for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tigerbot.mlflow_client import mlflow_client, run_of_folder
from tigerbot.runs import read_json
from tigerbot_jobs import webpage
from tigerbot_jobs.finding import find_record, is_held
from tigerbot_jobs.shown import printable
from tigerbot_jobs.sweep.analysis import History
from tigerbot_jobs.sweep.analysis_cost import failures
from tigerbot_jobs.sweep.analysis_read import read_events, read_history
from tigerbot_jobs.sweep.analysis_seeds import recommended
from tigerbot_jobs.sweep.journal import JOURNAL
from tigerbot_jobs.sweep.page import About, page
from tigerbot_jobs.sweep.page_line import Limits, line, progress

PAGE = "report.html"


def find_journal(sweep: str, folder: Path) -> Path:
    """The journal of a sweep by its name in a storage folder, by its folder, or by the file itself.

    Raises:
        InputError: there is no such sweep, or it has no journal.
    """
    return find_record(sweep, folder, JOURNAL, kind="sweep", what="journal", begins="the first trial")


def write_report(journal: Path, path: Path | None = None, *, state: str = "") -> Path:
    """Write the page of a sweep, into its folder where no other path is given; returns where it is.

    Args:
        state: what a driver that is about to end knows better than its folder yet says.

    Raises:
        InputError: the journal cannot be read.
        StorageError: the page cannot be written there.
    """
    told = about(journal)
    told = replace(told, state=state or told.state)
    return webpage.write(path or journal.with_name(PAGE), page(read_history(journal), told))


def about(journal: Path) -> About:
    """What the sweep's folder says of it."""
    folder = journal.absolute().parent
    spec = read_json(folder / "spec.json", {}).get("spec", {})
    return About(str(spec.get("name") or folder.name), _state(folder), spec)


def log_report(path: Path, journal: Path) -> str:
    """Attach the page to the sweep's run in MLflow; returns a line that says where, or why there is no such run.

    Raises:
        TrackingError: MLflow does not take it.
    """
    tracking = about(journal).spec.get("tracking") or {}
    if not tracking.get("uri"):
        return "not logged: the sweep's spec, which names the MLflow server, is not beside its journal"
    with mlflow_client(tracking["uri"]) as api:
        run_id = run_of_folder(api, tracking.get("experiment", ""), journal.absolute().parent, "sweep")
        if run_id is not None:
            api.log_artifact(run_id, str(path))
    if run_id is None:
        return f"not logged: MLflow at {tracking['uri']} has no run of this sweep yet"
    return f"logged to MLflow run {run_id}"


def lines(journal: Path) -> Iterator[str]:
    """What a terminal shows: how far it is, what it recommends, what failed."""
    found, told = read_history(journal), about(journal)
    yield f"{printable(told.name)}: {told.state}, {_standing(journal, told)}"
    yield _recommendation(found)
    for failure in failures(found)[:5]:
        error = f": {failure.error[:160]}" if failure.error else ""
        yield printable(f"  failed, {failure.cause}: {failure.attempts:,} attempts of {failure.trials:,} trials{error}")


def _standing(journal: Path, told: About) -> str:
    found = progress(read_events(journal))
    if told.state == "running":
        return line(found, Limits.of(told.spec), time.time())
    over = replace(found, running=(), ends=())  # what nobody works on has neither a rate nor a time left
    return line(over, Limits(), time.time())


def _recommendation(history: History) -> str:
    best = recommended(history)
    if best is None:
        return "  no trial has ended with a value yet"
    params = ", ".join(f"{name}={value}" for name, value in best.trial.params.items())
    if best.rerun is None:
        worth = f"{history.metric} {best.value:.5g} in the search, by no fresh seed"
    else:
        one = best.rerun
        interval = f" [{one.low:.5g}, {one.high:.5g}]" if len(one.fresh) > 1 else ""
        worth = f"{history.metric} {one.mean:.5g}{interval} by {len(one.fresh)} fresh seed{'' if len(one.fresh) == 1 else 's'}"
    return printable(f"  recommended: {best.trial.config}, {worth}: {params}")


def _state(folder: Path) -> str:
    status = str(read_json(folder / "state.json", {"status": "stopped"})["status"])
    if status != "running":
        return status
    return "running" if is_held(folder) else "interrupted"
