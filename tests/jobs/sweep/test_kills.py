"""The driver of a sweep is killed, again and again; what MLflow's database then holds is read by SQL."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.sweep_kills import kill_story


def test_a_sweep_whose_driver_is_killed_twice_loses_and_doubles_nothing(tmp_path: Path) -> None:
    found = kill_story(tmp_path, kills=2, trials=40, seed=29, sleep_s=0.1)

    assert found.kills == 2 and not found.wrong, found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_sweep_whose_driver_is_killed_fifty_times_loses_and_doubles_nothing(tmp_path: Path) -> None:
    seed = time.time_ns() % 1_000_000

    found = kill_story(tmp_path, kills=50, trials=300, seed=seed)

    assert found.kills > 20 and not found.wrong, f"seed {seed}: {found}"
