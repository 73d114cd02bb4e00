"""What earlier sweeps found, from MLflow by tag: `warm_start: {tiger.sweep: lr-town}`.

Every trial's run carries `tiger.sweep`, `tiger.target`, `tiger.metric` and its parameters. What is found at a sweep's
beginning is kept in its folder, so that it learns from the same whenever it goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tigerbot.errors import TrackingError, first_line
from tigerbot.mlflow_server import serve_tracking
from tigerbot.runs import read_json, write_json
from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.ranking import loss, modes_of
from tigerbot_jobs.sweep.searchers import Outcome
from tigerbot_jobs.sweep.space import Dimension, Space

_KEPT = "earlier.json"


def earlier_trials(spec: SweepSpec, space: Space, folder: Path) -> list[tuple[dict[str, Any], Outcome]]:
    """Finished trials of other sweeps with the wanted tags, whose parameters lie in this space.

    Raises:
        TrackingError: MLflow cannot be asked.
    """
    if not spec.warm_start:
        return []
    kept = read_json(folder / _KEPT, None)
    if kept is None:
        kept = _found(spec, space)
        write_json(folder / _KEPT, kept)
        print(f"  {len(kept)} trials of earlier sweeps are taken into account", flush=True)
    return [(one["params"], Outcome(tuple(one["losses"]))) for one in kept]


def _found(spec: SweepSpec, space: Space) -> list[dict[str, Any]]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    wanted = {"tiger.kind": "trial", "tiger.status": "done"} | spec.warm_start
    wanted_text = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
    server = serve_tracking(spec.tracking.uri)
    try:
        client = MlflowClient(server.url)
        experiments = [one.experiment_id for one in client.search_experiments()]
        runs: list[Any] = []
        token = None
        while token or not runs:
            page = client.search_runs(experiments, wanted_text, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                break
    except MlflowException as error:
        where, fix = "warm_start", "name tags of earlier trials, e.g. tiger.sweep"
        raise TrackingError(f"MLflow cannot be searched ({first_line(error)})", where=where, fix=fix) from None
    finally:
        server.stop()
    modes = modes_of(spec)
    found = []
    for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)):
        params = {d.name: _read(d, run.data.params[d.name]) for d in space.dimensions if d.name in run.data.params}
        values = [run.data.metrics.get(name) for name in modes]
        if run.data.tags.get("tiger.sweep") != spec.name and space.holds(params) and None not in values:
            losses = [loss(v, mode) for v, mode in zip(values, modes.values(), strict=True)]
            found.append({"params": params, "losses": losses})
    return found


def _read(dimension: Dimension, text: str) -> Any:
    """A parameter as it was: MLflow keeps texts."""
    if dimension.kind == "choice":
        return next((choice for choice in dimension.values if str(choice) == text), text)
    try:
        return int(text) if dimension.kind.endswith("int") else float(text)
    except ValueError:
        return text
