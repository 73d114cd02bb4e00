"""Mistakes of a target that show in what it reports: a metric that never comes, steps that go backwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tigerbot.errors import SpecError
from tigerbot_jobs.sweep.space import near
from tigerbot_jobs.sweep.trials import Trial


class Noticed:
    """What one driver has seen.

    Args:
        metric, objectives: the sweep's.
    """

    def __init__(self, metric: str, objectives: Collection[str]) -> None:
        self._metric, self._objectives = metric, objectives
        self._names, self._said = set[str](), False

    def metrics(self, names: Iterable[str]) -> None:
        self._names.update(names)

    def ended_without(self, trial: str, *, anybody: bool) -> None:
        """A trial ended well and never reported the metric; `anybody` has.

        Raises:
            SpecError: nobody has, so nobody will.
        """
        if anybody:
            return
        where, names = f"metric {self._metric}", sorted(self._names)
        if not names:
            fix = "let the target call report({...}) with it"
            raise SpecError(f"{trial} ended and reported no number", where=where, fix=fix)
        what = f"{trial} ended and never reported it; it reported {', '.join(names)}"
        raise SpecError(what, where=where, fix=near(self._metric, names))

    def ended(self, trial: Trial, trials: Collection[Trial]) -> None:
        """A trial ended well.

        Raises:
            SpecError: its last report of the metric lacked an objective, as those of all trials do.
        """
        for objective in self._objectives:
            if not any(objective in other.metrics for other in trials):
                names = sorted(trial.metrics)
                what = f"{trial.name} ended without it; its last report held {', '.join(names)}"
                raise SpecError(what, where=f"objectives.{objective}", fix=near(objective, names))

    def backwards(self, trial: str, reports: int) -> None:
        if reports and not self._said:
            print(
                f"  {trial} reported {reports} steps that were not after the one before; they are left out", flush=True
            )
            self._said = True
