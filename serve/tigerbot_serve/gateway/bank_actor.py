"""The bank as a named, detached actor of Ray: one for an endpoint, whatever version of it runs.

Not an actor of the deployment: Serve names those after the code version, so that during a rollout the old and the new
replicas would each have a bank of their own and every limit would be there twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway.bank import Ask, Bank, Grant
from tigerbot_serve.gateway.leased_limiter import LeasedLimiter
from tigerbot_serve.gateway.ledger import Ledger

NAMESPACE = "tiger-serve"
STARTS_WITHIN_S = 120.0
CLOSES_WITHIN_S = 5.0


class BankActor:
    """The actor's class. `path` is where what was spent is kept."""

    def __init__(self, path: str) -> None:
        self._bank = Bank(Ledger(Path(path)))

    def sync(self, replica: str, asks: Mapping[str, Ask]) -> dict[str, Grant]:
        return self._bank.sync(replica, asks)

    def close(self) -> None:
        self._bank.close()


def shared_limiter(spec: ServeSpec, path: Path, *, replicas: int) -> LeasedLimiter:
    """The limiter of a replica among several, which finds the bank, or starts it again, by its name.

    Args:
        path: the file of what was spent, on the machine of the first replica.
        replicas: how many there may be.
    """
    name = f"limits-{secrets.token_hex(8)}"
    bank: list[Any] = []

    async def sync(asks: dict[str, Ask]) -> Mapping[str, Grant]:
        if not bank:
            bank.append(_bank(spec.name, path))
        try:
            return await bank[0].sync.remote(name, asks)
        except BaseException:
            bank.clear()  # it may have died for good: the next ask finds or makes another
            raise

    return LeasedLimiter(spec.access, sync, replicas=replicas)


def start_bank(spec: ServeSpec, path: Path) -> None:
    """Have it answer before the first request needs it: an actor's process takes seconds to start."""
    import ray

    ray.get(_bank(spec.name, path).sync.remote("deploy", {}), timeout=STARTS_WITHIN_S)


def stop_bank(name: str) -> None:
    """End an endpoint's bank, if it has one."""
    import ray
    from ray.exceptions import RayError

    try:
        bank = ray.get_actor(_name(name), namespace=NAMESPACE)
    except ValueError:
        return
    with suppress(RayError):  # one that does not answer has written what it lent
        ray.get(bank.close.remote(), timeout=CLOSES_WITHIN_S)
    ray.kill(bank)


def _bank(name: str, path: Path) -> Any:
    import ray

    return (
        ray.remote(BankActor)
        .options(
            name=_name(name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1,
        )
        .remote(str(path))
    )


def _name(name: str) -> str:
    return f"tiger-limits-{name}"
