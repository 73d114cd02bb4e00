"""`kill -9` of a sweep's driver at random moments, the same command each time, and what SQL then finds in MLflow.

Trials are deterministic and write what they report into a file of their own too, so that "lost" and "doubled" are
counted against what really happened. The seed of the moments is printed. `KILLS=50 TRIALS=300 python -m
benchmarks.sweep_kills` is the whole story; `make soak` runs it as a test.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Row
from tigerbot.spec import SweepSpec, load_spec
from tigerbot_jobs.sweep.course import Course, scheduler_of
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "50"))
TRIALS = int(os.environ.get("TRIALS", "300"))
STEPS = 12
_LIFE_S = 6.0  # the longest that a life that is to be killed works
_START_S = 120.0


def objective(params: Mapping[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    """A loss of the parameters alone; an audit line before each report. It keeps nothing: cut short, it begins anew."""
    with Path(params["audit"]).open("a", buffering=1) as audit:
        for step in range(1, STEPS + 1):
            time.sleep(params["sleep_s"])
            value = abs(params["x"]) + abs(params["y"]) / step
            audit.write(f"{report.name} {step} {value!r}\n")  # type: ignore[attr-defined]
            report({"loss": value, "half": value / 2, "step": step})


@dataclass(frozen=True)
class Found:
    """What is wrong after all kills; all zero when nothing is. `seconds` is the whole story's."""

    kills: int
    seconds: float
    doubled_runs: int
    missing_runs: int
    finished_again: int
    changed_ends: int
    doubled_points: int
    lost_points: int
    foreign_points: int
    other_promotions: int
    wrong_states: int

    @property
    def wrong(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name not in ("kills", "seconds") and value}


def kill_story(folder: Path, *, kills: int, trials: int, seed: int, sleep_s: float = 0.15) -> Found:
    """Run a sweep in a folder, kill its driver so often, let it end, and look."""
    spec = _spec(folder, trials, sleep_s)
    chance, journal = random.Random(seed), folder / "kills/trials.jsonl"
    ended: dict[str, Any] = {}
    began, done = time.monotonic(), 0
    for kill in range(kills):
        process = _start(spec)
        if not _killed(process, journal, chance):
            break
        done += 1
        for name, record in _ends(journal).items():
            ended.setdefault(name, record)
        print(f"  kill {kill + 1}/{kills}: {len(ended)} of {trials} trials had ended", flush=True)
    subprocess.run(_command(spec), env=_environment(), check=True, stdout=subprocess.DEVNULL)
    return _look(folder, spec, ended, done, time.monotonic() - began)


def _spec(folder: Path, trials: int, sleep_s: float) -> Path:
    spec = {
        "kind": "sweep",
        "name": "kills",
        "target": "benchmarks.sweep_kills:objective",
        "space": {"x": {"uniform": [-1, 1]}, "y": {"uniform": [-1, 1]}},
        "trials": trials,
        "searcher": "tpe",
        "scheduler": "asha",
        "params": {"audit": str(folder / "audit.txt"), "sleep_s": sleep_s},
        "storage": {"uri": str(folder)},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    path = folder / "kills.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def _command(spec: Path) -> list[str]:
    return [sys.executable, "-m", "tigerbot.cli", "run", str(spec)]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parent)}


def _start(spec: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(spec), env=_environment(), stdout=subprocess.DEVNULL)


def _killed(process: subprocess.Popen[bytes], journal: Path, chance: random.Random) -> bool:
    """Kill it at a random moment: mostly while trials run, one time in five wherever it is; False when it was done."""
    anywhere, lives = chance.random() < 0.2, _lives(journal)
    until = time.monotonic() + (chance.uniform(0, 15) if anywhere else _START_S)
    while time.monotonic() < until and process.poll() is None and (anywhere or _lives(journal) == lives):
        time.sleep(0.02)
    if not anywhere:
        until = time.monotonic() + chance.uniform(0, _LIFE_S)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


def _records(journal: Path) -> list[dict[str, Any]]:
    whole = journal.read_text().rpartition("\n")[0].splitlines() if journal.exists() else []
    return [json.loads(line) for line in whole]


def _lives(journal: Path) -> int:
    return sum(record["event"] == "open" for record in _records(journal))


def _ends(journal: Path) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in _records(journal) if record["event"] == "end"}


def _look(folder: Path, path: Path, ended: dict[str, Any], kills: int, seconds: float) -> Found:
    spec = load_spec(path)
    assert isinstance(spec, SweepSpec)
    records = _records(folder / "kills/trials.jsonl")
    audited = {(name, int(step), float(value)) for name, step, value in map(str.split, (folder / "audit.txt").open())}
    said = Counter((r["name"], r["step"], r["value"]) for r in records if r["event"] == "point")
    kept, runs, states = _mlflow(folder / "mlflow.db", spec.name)
    over, again = set[str](), 0
    for record in records:
        again += record["event"] == "begin" and record["name"] in over
        if record["event"] == "end":
            over.add(record["name"])
    final = _ends(folder / "kills/trials.jsonl")
    return Found(
        kills=kills,
        seconds=seconds,
        doubled_runs=sum(count - 1 for count in runs.values()),
        missing_runs=spec.trials - len(runs),
        finished_again=again,
        changed_ends=sum(final[name] != record for name, record in ended.items()),
        doubled_points=sum(count - 1 for count in [*kept.values(), *said.values()]),
        lost_points=len(said.keys() - kept.keys()),
        foreign_points=len(kept.keys() - said.keys()) + len(said.keys() - audited),
        other_promotions=len(_promotions(records) ^ _replayed(spec, records)),
        wrong_states=sum(state != "FINISHED" for state in states),
    )


def _mlflow(database: Path, sweep: str) -> tuple[Counter[Any], Counter[str], list[str]]:
    """Points, runs and states of the trials, as the tables have them."""
    points = """select r.name, m.step, m.value from metrics m join runs r using (run_uuid) where m.key = 'loss'"""
    trials = f"select name, status from runs where name like '{sweep}-trial-%' and lifecycle_stage = 'active'"
    with closing(sqlite3.connect(database)) as opened:
        runs = opened.execute(trials).fetchall()
        kept = Counter((n.removeprefix(f"{sweep}-"), s, v) for n, s, v in opened.execute(points))
    return kept, Counter(name for name, _ in runs), [state for _, state in runs]


def _promotions(records: list[dict[str, Any]]) -> set[Any]:
    return {(r["name"], r["rung"], r["promoted"]) for r in records if r["event"] == "rung"}


def _replayed(spec: SweepSpec, records: list[dict[str, Any]]) -> set[Any]:
    """What a scheduler that never died says to the same results in the same order."""
    space = Space(spec.space)
    course, found = Course(spec, space, searcher_of(spec, space), scheduler_of(spec)), set()
    for record in records:
        course.apply(record)
        if record["event"] == "point" and (due := course.due.get(record["name"])):
            found |= {(due.trial, rung.rung, rung.promoted) for rung in due.rungs}
    return found


def main() -> list[Row]:
    seed = int(os.environ.get("SEED", time.time_ns() % 1_000_000))
    print(f"  seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = kill_story(Path(folder), kills=KILLS, trials=TRIALS, seed=seed)
    about = f"{found.kills} kills of the driver, {TRIALS} trials, ASHA, TPE, seed {seed}, {found.seconds:.0f} s"
    measures = {
        "runs doubled or missing": found.doubled_runs + found.missing_runs,
        "finished trials run again or changed": found.finished_again + found.changed_ends,
        "metric points doubled": found.doubled_points,
        "metric points lost": found.lost_points,
        "metric points nobody reported": found.foreign_points,
        "promotions unlike a replay of the same results": found.other_promotions,
        "runs whose end state is wrong": found.wrong_states,
    }
    return [Row(name, float(n), n, n, "lower", "0", 1, note=about) for name, n in measures.items()]


if __name__ == "__main__":
    for row in main():
        print(row)
