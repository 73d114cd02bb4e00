"""What is written to the journal, said to MLflow too: a run for every trial under the sweep's.

The tracker's outbox and the journal are two files. A record is journaled first, then said; a death in between leaves the
last of one unsaid in the other, so a driver that takes over says the last ones again, which doubles nothing.
"""

from __future__ import annotations

from typing import Any

from tigerbot.spec import SweepSpec
from tigerbot.tracking import TrackedRun, Tracker
from tigerbot_jobs.sweep.trials import Trial, config_name

_STATES: dict[str, Any] = {"done": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
SAID_AGAIN = 500  # records


class Follow:
    """Args:
    tags: of every trial's run, beside its own.
    """

    def __init__(self, spec: SweepSpec, tracker: Tracker, parent: TrackedRun, tags: dict[str, str]) -> None:
        self._spec, self._tracker, self._parent = spec, tracker, parent
        self._tags = tags | {"tiger.kind": "trial", "tiger.sweep": spec.name} | spec_tags(spec)
        self._runs: dict[str, TrackedRun] = {}
        self._changed: dict[str, dict[str, float]] = {}  # parameters to log with the next point

    def begin(self, trial: Trial) -> None:
        tags = self._tags | {"tiger.config": config_name(trial.config), "tiger.seed": str(trial.seed)}
        params = {**self._spec.params, **trial.params}
        name = f"{self._spec.name}-{trial.name}"
        self._runs[trial.name] = self._tracker.run(name, params=params, tags=tags, parent=self._parent)

    def point(self, trial: str, step: int, metrics: dict[str, float], at: float | None = None) -> None:
        """Values that are no numbers are said too: MLflow's `diverged` becomes 1. `at`: its record's Unix time."""
        self._runs[trial].log(metrics | self._changed.pop(trial, {}), step=step, at=at)

    def exploit(self, trial: str, source: str, step: int, after: dict[str, Any]) -> None:
        """MLflow's parameters cannot change: what a member goes on with is in its metrics, from its next step."""
        self._changed[trial] = {f"hp/{n}": float(v) for n, v in after.items() if isinstance(v, int | float)}
        self._runs[trial].tag(**{f"tiger.exploit.{step}": source})

    def end(self, trial: Trial) -> None:
        run = self._runs.pop(trial.name)
        self._changed.pop(trial.name, None)
        about = {"tiger.status": trial.status, "tiger.cause": trial.cause, "tiger.error": trial.error}
        run.tag(**{name: value for name, value in about.items() if value})
        run.finish(_STATES[trial.status])

    def leave(self) -> None:
        """Those that run are cut short: killed, until the sweep goes on."""
        for run in self._runs.values():
            run.finish("KILLED")
        self._runs.clear()

    def say_again(self, records: list[dict[str, Any]], trials: dict[str, Trial]) -> None:
        """The last records of an earlier driver."""
        for name in dict.fromkeys(record["name"] for record in records if "name" in record):
            trial = trials[name]
            self.begin(trial)
            for record in records:
                if record["event"] == "point" and record["name"] == name:
                    values = {k: float("nan") if v is None else v for k, v in record["metrics"].items()}
                    self.point(name, record["step"], values, record["t"])
            if trial.over:
                self.end(trial)


def spec_tags(spec: SweepSpec) -> dict[str, str]:
    """What a later sweep can find these trials by."""
    return {"tiger.target": spec.target, "tiger.metric": spec.metric}
