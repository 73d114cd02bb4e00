"""A sweep's worth of runs while its server, its courier and the job itself are killed: read by SQL afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

TRIALS, POINTS = 900, 13
KILLS = {"server": 10, "courier": 5, "job": 5}

# A trial is a pure function of its number, as in a sweep that resumes: what ended is kept, what did not begins again.
STORY = textwrap.dedent("""
    import pathlib, sys, time
    from tigerbot.tracking import Tracker
    folder, trials, points = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    audit = (folder / "ended").open("a+")
    audit.seek(0)
    ended = len(audit.read().split())
    tracker = Tracker(f"sqlite:///{folder}/m.db", "soak", folder / "run")
    parent = tracker.run("parent")
    for trial in range(ended, trials):
        run = tracker.run(f"trial-{trial}", params={"lr": trial / 7}, parent=parent)
        for step in range(points):
            run.log({"loss": trial / (step + 3)}, step=step)
            time.sleep(0.002)
        run.finish("FAILED" if trial % 10 == 0 else "FINISHED")
        print(trial, file=audit, flush=True)
        time.sleep(0.15)
    parent.finish()
    assert tracker.close(240)
""")


def couriers(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "tigerbot.courier" in words and str(folder) in words[-1]:
                found.append(process)
    return found


def kill_server(folder: Path) -> bool:
    """Kill the server if it answers; whether it did."""
    try:
        card = json.loads((folder / "m.db.server.json").read_text())
        httpx.get(f"{card['url']}/health", timeout=2)
        os.killpg(card["pid"], signal.SIGKILL)
        return True
    except (OSError, ValueError, httpx.HTTPError):
        return False


@pytest.mark.soak
@pytest.mark.timeout(1400)
def test_ten_server_kills_and_ten_of_ours_lose_and_double_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("TIGER_SEED", str(random.randrange(10**6))))
    print(f"seed {seed}")
    chance, left = random.Random(seed), dict(KILLS)
    command = [sys.executable, "-c", STORY, str(tmp_path), str(TRIALS), str(POINTS)]

    job = subprocess.Popen(command)
    while True:
        if job.poll() is not None:
            assert job.returncode in (0, -signal.SIGKILL)
            if job.returncode == 0:
                break
            job = subprocess.Popen(command)
        time.sleep(chance.uniform(0.5, 5.0))
        victim = chance.choice([name for name, times in left.items() if times] or [""])
        if victim == "server" and kill_server(tmp_path):
            left["server"] -= 1
        elif victim == "courier" and (found := couriers(tmp_path)):
            chance.choice(found).kill()
            left["courier"] -= 1
        elif victim == "job" and job.poll() is None:
            job.kill()
            job.wait()
            left["job"] -= 1

    assert not any(left.values()), f"the sweep ended before all kills: {left}"
    with sqlite3.connect(tmp_path / "m.db") as connection:
        query = connection.execute
        active = "from runs where lifecycle_stage = 'active'"
        assert query(f"select count(*), count(distinct name) {active}").fetchall() == [(TRIALS + 1, TRIALS + 1)]
        ends = dict(query(f"select status, count(*) {active} group by status").fetchall())
        assert ends == {"FAILED": TRIALS // 10, "FINISHED": TRIALS - TRIALS // 10 + 1}
        points = query(
            "select r.name, m.step, m.value from metrics m join runs r using (run_uuid)"
            " where r.lifecycle_stage = 'active' and m.key = 'loss'"
        ).fetchall()
        expected = {(f"trial-{t}", step, t / (step + 3)) for t in range(TRIALS) for step in range(POINTS)}
        assert len(points) == len(expected) and set(points) == expected
        assert query("select count(*) from params where key = 'lr'").fetchall() == [(TRIALS,)]
