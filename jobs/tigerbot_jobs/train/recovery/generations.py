"""How a generation begins and how it is called off.

It begins from the newest whole state, with the survivors and the spares that the rendezvous names; it ends when its
members were told to leave and every living one is out. Why it is to end is `faults.py`'s to say.
"""

from __future__ import annotations

import time
from dataclasses import replace

from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.ending import Ending
from tigerbot_jobs.train.recovery.inventory import choose
from tigerbot_jobs.train.recovery.members import Members, Spawn
from tigerbot_jobs.train.recovery.past import Past
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.rendezvous import Generation, Phase
from tigerbot_jobs.train.recovery.settings import HubSettings
from tigerbot_jobs.train.recovery.suspects import Suspects
from tigerbot_jobs.train.watch.hangs import HangWatch

_SETTLE_S = 1.0  # a generation this young is not paused for one more worker


class Generations:
    """One after the other."""

    def __init__(
        self,
        settings: HubSettings,
        members: Members,
        books: Books,
        persister: Persister,
        past: Past,
        ending: Ending,
        watch: HangWatch,
        suspects: Suspects,
        spawn: Spawn,
    ) -> None:
        self._settings, self._members, self._rendezvous = settings, members, members.rendezvous
        self._books, self._persister, self._past, self._ending = books, persister, past, ending
        self._watch, self._suspects, self._spawn = watch, suspects, spawn
        # Of the generation there is, or is to be.
        self._reason = "start"
        self._restored: set[str] = set()
        self._done: set[str] = set()
        self._told = self._pause_number = -1
        self._paused_for = ""
        self._began = time.monotonic()
        self._ended_at = self._formed_at = 0.0

    @property
    def is_told(self) -> bool:
        """Whether a generation runs and its members know: until then they beat in the name of the one before."""
        return self._rendezvous.phase is Phase.RUNNING and self._told == self._rendezvous.current.number

    @property
    def is_restored(self) -> bool:
        """Whether every living member of the generation has its state."""
        return self._restored >= {m for m in self._rendezvous.current.members if m} != set()

    def tick(self, now: float) -> None:
        """Called often: end who does not leave, grow where there is somebody to grow by, gather, keep what is due."""
        if self._rendezvous.awaited and now - self._ended_at > self._settings.out_wait_s:
            self._ended_at = now
            for worker in self._rendezvous.awaited:
                self._members.end(worker, "did not leave the generation that was called off")
        if self._rendezvous.wants_to_grow and self.is_restored and now - self._formed_at > _SETTLE_S:
            self.pause("grow")
        if self._rendezvous.phase is not Phase.RUNNING:
            self.gather()
        elif not self._ending.leaving:
            self._persister.tick()

    def gather(self) -> None:
        """Form the next generation, if it can begin."""
        if self._ending.verdict is not None or self._ending.leaving:
            return
        first = self._rendezvous.current.number == 0 or self._reason == "start"
        patient = first and time.monotonic() - self._began < self._settings.start_wait_s
        generation = self._rendezvous.next_generation(wait_for=self._settings.full if patient else 0)
        if generation is not None:
            self._spawn(self._form(generation))

    def restored(self, worker: str, message: say.Restored) -> None:
        """A member has its state."""
        if not self._restored:
            self._past.began(message.generation, message.step)
            self._books.step = message.step
        self._restored.add(worker)
        if self._restored >= set(self._rendezvous.current.members):
            about = {"generation": message.generation, "step": message.step, "tier": message.tier}
            self._books.log("restored", **about, seconds=message.seconds)
            self._reason = "fault"

    def done(self, worker: str) -> None:
        """A member has nothing left to do."""
        self._done.add(worker)
        if self._done >= {m for m in self._rendezvous.current.members if m}:
            self._ending.finish()

    def pause(self, why: str) -> None:
        """Have the members leave at their next step boundary; said once a generation."""
        number = self._rendezvous.current.number
        if self._pause_number == number:
            return
        self._paused_for, self._pause_number = why, number
        text = f"the generation leaves at its next step boundary ({why})"
        self._books.decide("grow" if why == "grow" else "wait", text)
        self._members.tell(say.Pause(number))

    def paused(self) -> None:
        """A member left at the boundary, as it was told."""
        self.end(self._paused_for or "grow")

    def end(self, reason: str) -> None:
        """Call the current generation off."""
        self._reason, self._ended_at = reason, time.monotonic()
        self._persister.forget()
        self._members.tell(say.Abort(self._rendezvous.current.number))
        self.gather()

    async def _form(self, generation: Generation) -> None:
        reason, before, peers = self._reason, self._restored, self._members.peers
        self._restored, self._done = set(), set()
        self._formed_at = time.monotonic()
        about = {"generation": generation.number, "world_size": generation.world_size}
        self._books.log("generation", **about, members=list(generation.members), reason=reason)
        if before and reason == "fault":
            action = "replace" if generation.world_size == len(before) else "shrink"
            self._books.decide(action, f"{generation.world_size} of {self._settings.high} workers train on")
        if not self._past.is_empty:
            # An earlier life may have left its state in memory, which only a keeper sees; a new run has nothing there.
            await peers.keepers_of(generation.members, timeout_s=20.0 if reason == "start" else 2.0)
        shards = self._past.newest_whole(await peers.look())
        stored = await self._persister.newest(self._past.at_most)
        if generation != self._rendezvous.current or self._rendezvous.phase is not Phase.RUNNING:
            return  # called off meanwhile
        self._past.at_most = None
        self._begin(generation, choose(shards, stored))

    def _begin(self, generation: Generation, begin: say.Form) -> None:
        """Tell every member its rank and where to begin."""
        self._watch.new_generation(generation.number, generation.members)
        self._told = generation.number
        self._suspects.new_generation(generation.members)
        begin = replace(begin, generation=generation.number, world_size=generation.world_size)
        begin = replace(begin, skips=self._past.skips, guard=self._past.guard)
        for rank, worker in enumerate(generation.members):
            peer = self._members.peers.workers.get(worker)
            if peer is not None:
                peer.send(replace(begin, rank=rank))
