"""Islands of several ranks in real processes, on a toy model: agreement, overlap, kills, a server that goes away."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outer_process import TEST_SECRET, OuterProcess

from tigerbot_jobs.train.islands.server import SECRET
from tigerbot_jobs.train.islands.state import load_state

STEPS, EVERY = 40, 10


class Island:
    """Its ranks, in processes of their own, started at once."""

    def __init__(self, server: OuterProcess, folder: Path, island: int, world_size: int, **given: Any) -> None:
        self._given = {"address": server.address, "island": island, "world_size": world_size, "folder": str(folder)}
        self._given |= {"steps": STEPS, "every": EVERY, "target": 1.0 + 2 * island} | given
        self.folder, self.island, self.world_size = folder, island, world_size
        meeting = folder / f"meeting-{os.urandom(4).hex()}"
        script = str(Path(__file__).with_name("toy_island.py"))
        self.ranks = [
            subprocess.Popen(
                [sys.executable, script, json.dumps(self._given | {"rank": rank, "meeting": str(meeting)})],
                env=os.environ | {SECRET: TEST_SECRET, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(self.world_size)
        ]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def finish(self) -> None:
        for rank in self.ranks:
            assert rank.wait(200) == 0

    def log(self, word: str = "step") -> list[tuple[int, float]]:
        """(step, when) of every step, or of every time it joined."""
        path = self.folder / f"island-{self.island}-rank-0.steps"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(int(step), float(when)) for kind, step, when in lines if kind == word]

    def wait_for(self, step: int) -> None:
        until = time.monotonic() + 150
        while not any(made >= step for made, _ in self.log()):
            assert time.monotonic() < until, "too slow"
            time.sleep(0.01)

    def weights(self) -> np.ndarray:
        parts = [np.load(self.folder / f"island-{self.island}-rank-{rank}.npz") for rank in range(self.world_size)]
        return np.concatenate([part["master"] for part in parts])[:710]


@pytest.fixture
def outer(tmp_path: Path) -> Iterator[OuterProcess]:
    server = OuterProcess(tmp_path / "outer", count=2, lr=1.0, momentum=0.0)
    yield server
    server.kill()


def longest_step(island: Island, after: float = 0.0) -> float:
    times = [when for _, when in island.log() if when >= after]
    return max(b - a for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("stage", "islands"), [(2, {}), (0, {}), (2, {"overlap": True}), (2, {"quantize": "none"})], ids=str
)
def test_islands_end_with_the_same_weights_between_their_targets(
    outer: OuterProcess, tmp_path: Path, stage: int, islands: dict[str, Any]
) -> None:
    both = [
        Island(outer, tmp_path, 0, 2, stage=stage, islands=islands, step_s=0.01),
        Island(outer, tmp_path, 1, 1, islands=islands, step_s=0.01),
    ]

    for island in both:
        island.finish()

    first, second = (island.weights() for island in both)
    assert (first == second).all()
    assert np.allclose(first, first[0], atol=0.02) and 1.5 < first[0] < 2.5
    assert [row["counted"] for row in outer.rounds() if "counted" in row] == [[0, 1]] * (STEPS // EVERY)


def test_an_island_killed_in_mid_round_joins_again_where_it_was_and_the_other_hardly_waits(
    outer: OuterProcess, tmp_path: Path
) -> None:
    hurry = {"step_s": 0.05, "steps": 120}
    steady, hurt = Island(outer, tmp_path, 0, 1, **hurry), Island(outer, tmp_path, 1, 2, **hurry)
    standby = Island(outer, tmp_path, 1, 2, gate=str(tmp_path / "go"), **hurry)

    hurt.wait_for(25)
    hurt.kill()
    died = time.time()
    steady.wait_for(60)
    (tmp_path / "go").touch()
    for island in (steady, standby):
        island.finish()

    resumed = standby.log("joined")[-1][0]
    assert 20 <= resumed < 35, "the counted steps are not made again"
    assert longest_step(steady, after=died) < 15
    counted = [row["counted"] for row in outer.rounds() if "counted" in row]
    assert counted[:2] == [[0, 1]] * 2 and [0] in counted and [1] in counted
    assert steady.log()[-1][0] == standby.log()[-1][0] == 120


def test_without_the_server_islands_train_on_and_meet_again_when_it_is_back(
    outer: OuterProcess, tmp_path: Path
) -> None:
    both = [Island(outer, tmp_path, island, 1, step_s=0.1, steps=100) for island in (0, 1)]
    for island in both:
        island.wait_for(15)

    outer.kill()
    for island in both:
        island.wait_for(31)
    alone = load_state(outer.folder).round  # type: ignore[union-attr]
    outer.start()
    for island in both:
        island.finish()

    assert alone == 1
    assert (both[0].weights() == both[1].weights()).all()
    assert load_state(outer.folder).round >= 2  # type: ignore[union-attr]


def test_a_server_that_lost_its_state_is_seeded_anew(outer: OuterProcess, tmp_path: Path) -> None:
    both = [Island(outer, tmp_path, island, 1, step_s=0.05, steps=60) for island in (0, 1)]
    for island in both:
        island.wait_for(25)

    outer.kill()
    (outer.folder / "outer.safetensors").unlink()
    outer.start()
    for island in both:
        island.finish()

    assert np.allclose(both[0].weights(), both[1].weights(), atol=0.3)
    assert 1.2 < both[0].weights().mean() < 2.8
