"""What stands in the file of budgets when a process is killed: at least what was spent, and not much more."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_windows import Fleet

from tigerbot.spec.access import AccessSpec, BudgetSpec, LimitsSpec
from tigerbot_serve.gateway import ledger as ledgers
from tigerbot_serve.gateway.keys import OPEN
from tigerbot_serve.gateway.ledger import Ledger, Tokens
from tigerbot_serve.gateway.limits import Limiter

BUDGET = BudgetSpec(tokens=100_000, per="month")
SPARE = 100  # a thousandth of it
LIMITS = LimitsSpec(budget=BUDGET, requests_per_minute=1_000_000, tokens_per_minute=100_000_000, concurrent=64)
HELD = 5000  # of a request that does not end
SPENDS = """
import asyncio, random, sys
from pathlib import Path
from tigerbot.spec.access import AccessSpec, LimitsSpec
from tigerbot_serve.gateway.keys import OPEN
from tigerbot_serve.gateway.ledger import Ledger, Tokens
from tigerbot_serve.gateway.limits import Limiter

limiter = Limiter(AccessSpec(limits=LimitsSpec.model_validate_json(sys.argv[2])), Ledger(Path(sys.argv[1])))

async def reserved(tokens):
    await limiter.ready(OPEN, Tokens(completion=tokens))
    return limiter.reserve(OPEN, Tokens(completion=tokens))

async def story():
    draw, spent = random.Random(1), 0
    await reserved(%d)
    while True:
        held = await reserved(asked := draw.randint(1, 300))
        used = draw.randint(0, asked)
        limiter.settle(held, Tokens(completion=used))
        print(spent := spent + used, flush=True)

asyncio.run(story())
"""


def in_file(path: Path, budget: BudgetSpec = BUDGET, now: float | None = None) -> int:
    return Ledger(path).spent(OPEN.id, budget, time.time() if now is None else now)


def test_a_process_that_is_killed_leaves_all_it_spent_and_what_was_under_way(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    command = [sys.executable, "-c", SPENDS % HELD, str(path), LIMITS.model_dump_json()]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [next(process.stdout) for _ in range(120)]
        process.kill()
        lines += list(process.stdout)
    spent = int([line for line in lines if line.endswith("\n")][-1])

    assert spent + HELD <= in_file(path) <= spent + HELD + 3 * 300 + SPARE


@pytest.mark.parametrize("seed", range(3))
def test_a_bank_that_is_killed_leaves_all_that_replicas_spent_or_may_spend(tmp_path: Path, seed: int) -> None:
    draw, path, budget = random.Random(seed), tmp_path / "budgets.json", BudgetSpec(tokens=5000)
    fleet = Fleet(2, LimitsSpec(budget=budget), Ledger(path))
    running, spent = [], 0

    for _ in range(60):
        fleet.passes(draw.choice((0, 0.3, 1)))
        place = draw.randrange(2)
        if running and draw.random() < 0.5:
            place, held = running.pop()
            used = draw.randint(0, held.cost)
            fleet.accounts[place].settle(held, used, used)
            spent += used
        elif (held := fleet.take(place, 1, draw.randint(1, 60))) is not None:
            running.append((place, held))
        if path.exists():
            rows = json.loads(path.read_text())
            assert sum(amount for _, amount in rows.values()) >= spent + sum(held.cost for _, held in running)
        else:
            assert not running and not spent
    fleet.bank.close()


def limiter_of(path: Path, limits: LimitsSpec = LIMITS) -> Limiter:
    return Limiter(AccessSpec(limits=limits), Ledger(path))


def test_what_was_not_used_is_taken_out_again_and_an_end_in_order_leaves_the_exact_sum(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    limiter = limiter_of(path)

    async def story() -> None:
        await limiter.ready(OPEN, Tokens(completion=9000))
        held = limiter.reserve(OPEN, Tokens(completion=9000))
        assert in_file(path) >= 9000
        limiter.settle(held, Tokens(completion=40))

    asyncio.run(story())
    until = time.monotonic() + 30
    while in_file(path) > 40 + SPARE:
        assert time.monotonic() < until, "it still counts as spent"
        time.sleep(0.05)
    assert in_file(path) >= 40

    limiter.close()

    assert in_file(path) == 40


def test_a_refused_request_leaves_nothing_promised(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    limiter = limiter_of(path, LIMITS.model_copy(update={"tokens_per_minute": 10}))

    async def story() -> None:
        await limiter.ready(OPEN, Tokens(completion=500))
        with pytest.raises(Exception, match="tokens a minute"):
            limiter.reserve(OPEN, Tokens(completion=500))

    asyncio.run(story())
    limiter.close()

    assert in_file(path) == 0


def test_few_requests_wait_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, write = [], ledgers.Ledger.write
    monkeypatch.setattr(ledgers.Ledger, "write", lambda ledger: (writes.append(1), write(ledger))[1])
    monkeypatch.setattr(ledgers, "WRITE_EVERY_S", 1000.0)  # so that all but the first are a request's own
    limiter = limiter_of(tmp_path / "budgets.json")

    async def story() -> None:
        for _ in range(200):
            await limiter.ready(OPEN, Tokens(completion=10))
            limiter.settle(limiter.reserve(OPEN, Tokens(completion=10)), Tokens(completion=5))

    asyncio.run(story())

    assert len(writes) <= 15  # 1,000 tokens, a hundred of them with each write
    limiter.close()


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    limiter = limiter_of(tmp_path / "file" / "budgets.json")

    async def story() -> None:
        for _ in range(5):
            await asyncio.wait_for(limiter.ready(OPEN, Tokens(completion=500)), 30)
            limiter.settle(limiter.reserve(OPEN, Tokens(completion=500)), Tokens(completion=500))

    asyncio.run(story())

    assert "spending is not written down" in caplog.text
    limiter.close()
