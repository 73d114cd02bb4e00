"""How a run ends: the verdict, and before it the last state goes to storage.

Until the newest whole state is kept nobody may leave, and shared memory is not cleared. It knows nothing about ranks
or faults: others say that the run is done, has failed, or is to leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.members import Spawn
from tigerbot_jobs.train.recovery.past import Past
from tigerbot_jobs.train.recovery.peers import Peers
from tigerbot_jobs.train.recovery.persist import Persister


@dataclass(frozen=True)
class Verdict:
    """How a run ended: `done`, `failed` with an error's parts, or `killed`."""

    reason: str
    error: dict[str, str] | None = None


class Ending:
    """The end of one run; `verdict` is None until it is there, and never changes then."""

    def __init__(self, books: Books, persister: Persister, past: Past, peers: Peers, spawn: Spawn) -> None:
        self._books, self._persister, self._past, self._peers, self._spawn = books, persister, past, peers, spawn
        self._header: dict[str, Any] | None = None
        self.leaving = False  # persist, then stop: Ctrl-C, or a failure
        self.verdict: Verdict | None = None
        self.kept = False  # the newest state is in storage, or nobody wants it: shared memory may be cleared

    def saved(self, header: dict[str, Any]) -> None:
        """The header of the last snapshot that was to be kept: what is kept at the end has the like."""
        self._header = header

    def finish(self) -> None:
        """Every member is done: the last state is to be in storage before anybody may leave."""
        self._spawn(self._finish())

    def fail(self, error: dict[str, str]) -> None:
        """Put the newest state that is whole into storage, dead workers' too, then stop."""
        self._spawn(self._keep_then(Verdict("failed", error)))

    def give_up(self, error: dict[str, str]) -> None:
        """Fail, and form no generation on the way."""
        self.leaving = True
        self.fail(error)

    def leave(self, *, training: bool) -> None:
        """Keep the state of the members that train, if they do, then stop: the run is to go on another time."""
        if self.verdict is not None:
            return
        if not training:
            self.conclude(Verdict("killed"))
            return
        self.leaving = True
        self._persister.request()
        self._spawn(self._leave_when_kept())

    def drop(self) -> None:
        """Stop, and keep nothing: the run will not go on."""
        self.kept = self.kept or self.verdict is None
        self.conclude(Verdict("killed"))

    def conclude(self, verdict: Verdict) -> None:
        """At once."""
        if self.verdict is not None:
            return
        self.verdict = verdict
        error = verdict.error["what"] if verdict.error else None
        if verdict.reason == "failed":
            self._books.decide("stop", error or "")
        self._books.log("stopped", reason=verdict.reason, error=error)

    def fail_now(self, what: str, *, kind: str = "TigerError") -> None:
        """At once, with nothing to be done about it."""
        self.conclude(Verdict("failed", {"type": kind, "what": what, "where": "", "fix": ""}))

    async def _leave_when_kept(self) -> None:
        self.kept = not await self._persister.settled(timeout_s=15)
        self.conclude(Verdict("killed"))

    async def _keep_then(self, verdict: Verdict) -> None:
        shards = self._past.newest_whole(await self._peers.look())
        if shards and self._header and shards[0].step > self._persister.kept_step:
            one = shards[0]
            about = {"step": one.step, "world_size": one.world_size, "zero_stage": one.zero_stage}
            self._persister.keep_shards(shards, self._header | about)
            await self._persister.settled(timeout_s=60)
        self.kept = bool(shards) and self._persister.kept_step >= shards[0].step
        self.conclude(verdict)

    async def _finish(self) -> None:
        problem = await self._persister.settled(timeout_s=600)
        if problem:
            self.fail_now(problem, kind="StorageError")
        else:
            self.kept = True
            self.conclude(Verdict("done"))
