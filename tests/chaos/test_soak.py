"""Random faults for as long as told (TIGER_SOAK_S, 240 seconds): what was survived, what was lost, how long it took."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from damage import Action, Damage, Done
from stories import INTERVAL, Story, make_corpus, pid_of

from tigerbot.tracking import serve_tracking
from tigerbot_jobs.train.goodput import account

SECONDS = float(os.environ.get("TIGER_SOAK_S", "240"))
EVERY_S = 15.0  # one fault in each such stretch
STEPS = int(6 * SECONDS)


def alive(workers: Sequence[str]) -> list[psutil.Process]:
    found = []
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid_of(worker)))
    return found


def actions(story: Story) -> list[Action]:
    def members() -> list[psutil.Process]:
        return alive(story.members()) if story.generations() else []

    def spares() -> list[psutil.Process]:
        return alive(story.spares()) if story.generations() else []

    def driver() -> list[psutil.Process]:
        return [] if story.driver.ended else [story.driver.process]

    return [
        Action("worker killed", "kill", members, weight=4),
        Action("standby killed", "kill", spares),
        Action("worker frozen", "freeze", members, weight=2),
        Action("worker paused", "pause", members, weight=2),
        Action("driver killed", "kill", driver),
    ]


def keep_going(story: Story, until: float) -> int:
    """The same command again for every killed driver; the exit status of the last."""
    while time.monotonic() < until:
        if story.driver.ended and (code := story.driver.wait(1)) >= 0:
            return code
        if story.driver.ended:
            story.start()
        time.sleep(0.1)
    raise AssertionError(f"no end: {story.told()}")


def report(story: Story, deeds: Sequence[Done], seed: int) -> str:
    found, lost = account(story.events()), story.steps_lost()
    times = sorted(found.mttr_s)
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    shares = ", ".join(f"{name} {share:.1f} s" for name, share in found.seconds.items() if share >= 0.05)
    done = Counter(deed.name for deed in deeds if deed.pid)
    return "\n".join(
        [
            f"seed {seed}, {story.steps} steps in {found.wall_s:.0f} s, {len(story.generations())} generations",
            f"survived: {', '.join(f'{count} x {name}' for name, count in sorted(done.items())) or 'nothing'}",
            f"steps lost: {sum(lost)} in {len(lost)} recoveries, at most {max(lost, default=0)}",
            f"seconds to recover: p50 {cuts[49]:.2f}, p90 {cuts[89]:.2f}, p99 {cuts[98]:.2f}"
            if cuts
            else "no incident",
            f"goodput {found.goodput:.1%} ({shares})",
        ]
    )


@pytest.mark.soak
@pytest.mark.timeout(6 * SECONDS + 600)
def test_random_faults_for_minutes_change_nothing_but_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("TIGER_SOAK_SEED", random.randrange(10**6)))
    with capsys.disabled():
        print(f"\nTIGER_SOAK_SEED={seed} TIGER_SOAK_S={SECONDS:g}", flush=True)
    corpus, server = make_corpus(tmp_path / "corpus"), serve_tracking(f"sqlite:///{tmp_path}/mlflow.db")
    size = {"tokens": STEPS * 256, "batch_tokens": 256, "micro_batch": 4, "validate_every": 200}
    tolerance = {"checkpoint_every_steps": 100}
    with Story(corpus, tmp_path / "undisturbed", server.url, tolerance=tolerance, **size) as quiet:
        assert quiet.wait(2 * SECONDS + 120) == 0
        undisturbed = quiet.ending()

    slow = [{"do": "wait", "seconds": 0.05}]
    story = Story(
        corpus, tmp_path / "soak", server.url, scale={"standbys": 1}, inject=slow, tolerance=tolerance, **size
    )
    damage = Damage(actions(story), seed, tmp_path / "damage.jsonl")
    with story:
        story.wait_for_workers(3)
        damage.start(EVERY_S, SECONDS)
        code = keep_going(story, time.monotonic() + 4 * SECONDS + 300)
        deeds = damage.stop()
        with capsys.disabled():
            print(report(story, deeds, seed), flush=True)

        assert code == 0
        story.check_books()
        story.check_nothing_is_left(patience_s=90)
        assert story.ending() == undisturbed
        assert max(story.steps_lost(), default=0) <= INTERVAL
    server.stop()
