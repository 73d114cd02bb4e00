"""The workers of a sweep, as its driver sees them: who has said what, who is free, who is gone.

Every worker that runs something has one call open all the time. It knows nothing of trials: a worker is a number, what it says is events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tigerbot_jobs.sweep.failures import Cause
from tigerbot_jobs.sweep.worker import Answer, Ended, Event, Task, Worker

_EXCHANGE_S = 2.0
_LOOK_S = 5.0


@dataclass(frozen=True)
class Lost:
    """A worker is gone."""

    cause: Cause
    error: str


@dataclass
class _Member:
    actor: Any
    call: Any = None
    node: str = ""  # known once it has started
    busy: bool = False
    waiting: list[Task | Answer] = field(default_factory=list)


class Crew:
    """Args:
    target: what they run.
    cpus, gpus: that a trial takes.
    within: in its worker's process; else it starts others, which take them.
    environment: of each.
    """

    def __init__(self, target: Any, *, cpus: float, gpus: float, within: bool, environment: dict[str, str]) -> None:
        self._target, self._cpus, self._gpus, self._environment = target, cpus, gpus, environment
        self._own_cpus, self._own_gpus = (cpus, gpus) if within else (0.0, 0.0)
        self._members: dict[int, _Member] = {}
        self._made = 0

    def __len__(self) -> int:
        return len(self._members)

    def slots(self) -> int:
        """Workers that the cluster can hold."""
        import ray

        has = ray.cluster_resources()
        slots = int(has.get("CPU", 0) / self._cpus + 1e-6) if self._cpus else 1 << 30
        return min(slots, int(has.get("GPU", 0) / self._gpus + 1e-6)) if self._gpus else slots

    def hire(self) -> int:
        """One more worker; its number."""
        import ray

        actor: Any = ray.remote(Worker)
        made = actor.options(
            num_cpus=self._own_cpus, num_gpus=self._own_gpus, runtime_env={"env_vars": self._environment}
        ).remote(self._target)
        self._made += 1
        self._members[self._made] = _Member(made)
        self._call(self._made)
        return self._made

    def dismiss(self, worker: int) -> None:
        """End a worker at once, with what it runs."""
        import ray

        ray.kill(self._members.pop(worker).actor)

    def send(self, worker: int, message: Task | Answer) -> None:
        """Hand something in with the next call, at once where none is open."""
        member = self._members[worker]
        member.busy = True
        member.waiting.append(message)
        if member.call is None:
            self._call(worker)

    def node(self, worker: int) -> str:
        return self._members[worker].node

    @property
    def ready(self) -> list[int]:
        """Those that have started."""
        return [number for number, member in self._members.items() if member.node]

    def heard(self, timeout_s: float) -> Iterator[tuple[int, list[Event] | Lost]]:
        """What was said. A worker that is lost is no longer one of us.

        A worker is called again when its events have been dealt with, so an answer travels with that call.
        """
        import ray

        calls = {member.call: number for number, member in self._members.items() if member.call is not None}
        if not calls:
            return
        done, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in done:
            number = calls[call]
            if number not in self._members:
                continue
            try:
                events = ray.get(call)
            except Exception as error:  # whatever Ray says of an actor that is gone
                lost = _lost(error, self._members[number])
                self.dismiss(number)
                yield number, lost
                continue
            member = self._members[number]
            member.call = None
            if not member.node:
                member.node, events = events, []
            if events and isinstance(events[-1], Ended):
                member.busy = False
            yield number, events
            if number in self._members and member.busy and member.call is None:
                self._call(number)

    def close(self) -> None:
        for number in list(self._members):
            with contextlib.suppress(Exception):  # Ray may be gone already
                self.dismiss(number)

    def _call(self, worker: int) -> None:
        member = self._members[worker]
        if not member.node:
            member.call = member.actor.node.remote()
            return
        message = member.waiting.pop(0) if member.waiting else None
        member.call = member.actor.exchange.remote(message, _EXCHANGE_S)


def _lost(error: Exception, member: _Member) -> Lost:
    """Why a worker is gone: its node, its memory, its process alone, or it never began."""
    import ray
    from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

    if isinstance(error, ActorUnavailableError):
        error = _second_answer(error, member)
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else text[:297] + "..."
    if isinstance(error, OutOfMemoryError) or "memory pressure" in text:
        return Lost("memory", shown)
    if not isinstance(error, RayActorError) or error.actor_init_failed:
        return Lost("bug", text[-300:])
    alive = {one["NodeID"] for one in ray.nodes() if one["Alive"]}
    gone = error.preempted or "node has died" in text or (member.node and member.node not in alive)
    gone = gone or isinstance(error, ActorUnavailableError)
    return Lost("node" if gone else "process", shown)


def _second_answer(error: Exception, member: _Member) -> Exception:
    """What Ray says when it has had time to look. Of a process that died it knows at once, of a node it takes a minute.

    So who is still only unavailable is on a node that is lost or cannot be reached.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        ray.get(member.actor.node.remote(), timeout=_LOOK_S)
    except GetTimeoutError:
        return error
    except Exception as found:
        return found
    return error
