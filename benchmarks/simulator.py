"""The goodput simulator: events a second on one core, against closed forms, published runs, and the targets of `ours`.

An event is one state transition of one replica (see `tigerbot_jobs.simulate.engine`); snapshots are not counted.
"""

from __future__ import annotations

import time

from benchmarks.harness import Row, rate
from tigerbot.spec import PolicySpec, SimulateSpec
from tigerbot_jobs.simulate.closed_form import goodput
from tigerbot_jobs.simulate.engine import Engine
from tigerbot_jobs.simulate.outcome import Estimate, simulate
from tigerbot_jobs.simulate.plain import plain_setting
from tigerbot_jobs.simulate.published import dlrover, llama3, targets
from tigerbot_jobs.simulate.setting import Setting, setting

HOUR = 3600.0
REPLICAS = 400
# M in hours, then d, t and R in seconds: research/training.md, section 6.1, and two on each side.
CASES = (
    (3.09, 60, 1800, 360),
    (3.09, 10, 600, 360),
    (49.5, 60, 3600, 1800),
    (7.9, 300, 10_800, 7200),
    (1.0, 120, 900, 600),
    (49.5, 0.05, 60, 5),
)


def main() -> list[Row]:
    ours = _situation(16_384, spares=82, days=20)
    whole = _situation(4096, spares=20, days=90)
    rows = [
        rate(
            "simulator, million events/s of one core (`ours`, 16,384 cards, 8,192 replicas)",
            lambda: _million_events_a_second(ours, 8192),
            target=">= 1",
            better="higher",
            note="events / CPU seconds of the process, one thread",
        ),
        rate(
            "90 days of 4,096 cards, one replica, seconds (of 1,000 run together)",
            lambda: _seconds(whole, 1000) / 1000,
            target="< 1",
            better="lower",
        ),
        _closed_form(),
    ]
    rows += [_share(one.case, one.outcome.goodput, one.published) for one in [*llama3(REPLICAS), *dlrover(REPLICAS)]]
    for one in targets(REPLICAS):
        wanted = f">= {100 * one.wanted:.0f}%" if one.wanted else "shown"
        case = f"ours, {one.cards:,} cards, M = {one.outcome.mtbf_h:.2f} h, {one.spares} spare nodes"
        rows.append(_share(case, one.outcome.goodput, wanted))
    return rows


def _situation(cards: int, *, spares: int, days: float) -> Setting:
    spec = SimulateSpec(kind="simulate", name="bench", cards=cards, spares=spares, days=days)
    return setting(spec, PolicySpec(preset="ours"))


def _million_events_a_second(situation: Setting, replicas: int) -> float:
    began = time.process_time()
    events = Engine(situation, replicas, 1).run().events
    return events / (time.process_time() - began) / 1e6


def _seconds(situation: Setting, replicas: int) -> float:
    began = time.process_time()
    Engine(situation, replicas, 1).run()
    return time.process_time() - began


def _closed_form() -> Row:
    errors = []
    for m, d, t, r in CASES:
        plain = plain_setting(mtbf_s=m * HOUR, every_s=t, block_s=d, recovery_s=r, horizon_s=200 * m * HOUR)
        simulated = simulate(plain, replicas=1024, seed=1).goodput.mean
        errors.append(100 * abs(simulated - goodput(t, d, m * HOUR, r)))
    name = f"largest difference to the closed form, points, {len(CASES)} cases x 1,024 seeds"
    return Row(name, max(errors), min(errors), max(errors), "lower", "<= 0.2", len(CASES))


def _share(case: str, found: Estimate, wanted: str) -> Row:
    percent = [100 * share for share in (found.mean, found.low, found.high)]
    return Row(f"simulated goodput, %: {case}", *percent, "higher", wanted, REPLICAS, note="95% interval of the mean")
