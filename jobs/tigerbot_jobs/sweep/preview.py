"""`tiger run --dry-run` of a sweep: its first points, how many trials there will be, and what is known of its target."""

from __future__ import annotations

import json
from pathlib import Path

from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.priors import prior_lines
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.target import changed, load_target

_SHOWN = 3


def preview(spec: SweepSpec) -> list[str]:
    """Lines; every check that a real run makes first has been made.

    Raises:
        SpecError: as the run would.
    """
    space = Space(spec.space)
    load_target(spec, space, threads=1, folder=Path())
    configurations = -(-spec.trials // spec.seeds)
    lines = [f"{spec.trials} trials, {configurations} configurations of {len(space.dimensions)} searched fields"]
    if spec.confirm is not None:
        lines.append(f"then the best {spec.confirm.top} again, {spec.confirm.seeds} fresh seeds each")
    searcher = searcher_of(spec, space)
    points = [searcher.propose(number) for number in range(min(_SHOWN, configurations))]
    lines += [f"  first: {json.dumps(point, ensure_ascii=False)}" for point in points if point is not None]
    if spec.target.endswith((".yaml", ".yml")):
        lines += prior_lines(spec, changed(spec.target, spec.params))
    return lines
