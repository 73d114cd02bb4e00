"""What each kind of fault does: who is ended or kept out, whether the generation goes, what it begins from again.

Every fault is written down and counted before anything is done; whether it is a bug that comes back, and what the
budgets say, `books.py` knows. A fault is found by others: a line that closed, the hang watch, a member's own words.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.ending import Ending
from tigerbot_jobs.train.recovery.generations import Generations
from tigerbot_jobs.train.recovery.members import Members, Spawn
from tigerbot_jobs.train.recovery.outcasts import Outcasts
from tigerbot_jobs.train.recovery.past import Past
from tigerbot_jobs.train.recovery.peers import Peer
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.suspects import Finding
from tigerbot_jobs.train.watch.bugs import BugKey
from tigerbot_jobs.train.watch.hangs import Hang

_FAULT_OF_HANG = {"node": "node", "partition": "partition", "collective": "partition", "shared": "storage"}
_NOT_THE_NODES = ("preemption", "exception", "storage", "straggler")
_BLAME_S = 0.5  # a dead neighbour's own connection closes within this


class Faults:
    """Of one run.

    Args:
        silence_s: a keeper that was not heard for so long is not asked to end anybody.
    """

    def __init__(
        self,
        members: Members,
        books: Books,
        persister: Persister,
        past: Past,
        outcasts: Outcasts,
        generations: Generations,
        ending: Ending,
        spawn: Spawn,
        silence_s: float,
    ) -> None:
        self._members, self._peers, self._rendezvous = members, members.peers, members.rendezvous
        self._books, self._persister, self._past, self._outcasts = books, persister, past, outcasts
        self._generations, self._ending, self._spawn, self._silence_s = generations, ending, spawn, silence_s

    # What the hub sees.

    def died(self, hello: say.Hello) -> None:
        """A worker's line is gone."""
        rank, evidence = self._members.rank_of(hello.worker), "its connection closed"
        ended = self._rendezvous.lost(hello.worker)
        if rank >= 0 and not self._ending.leaving:
            self._fault("process", hello.worker, rank, hello.node, evidence)
        if ended:
            self._judge(None, f"{hello.worker}: {evidence}")
            self._generations.end("fault")

    def hung(self, hang: Hang) -> None:
        worker = hang.worker or ""
        rank = hang.rank if hang.rank is not None else -1
        self._fault(_FAULT_OF_HANG.get(hang.kind, "hang"), worker, rank, hang.node or "", hang.evidence)
        if hang.kind in ("partition", "shared", "unheard") and hang.times == 1:
            self._books.decide("wait", hang.evidence)  # ending a generation would not mend it
            return
        self._rendezvous.end()
        keeper = self._peers.keepers.get(self._peers.node_of(worker))
        if keeper is not None and time.monotonic() - keeper.seen > self._silence_s:
            self._peers.drop_keeper(keeper.hello.node)
        if worker:
            self._members.end(worker, hang.evidence)
        self._judge(None, hang.evidence)
        self._generations.end("fault")

    def suspected(self, found: Finding) -> None:
        """The second sign on a slow rank is in."""
        if not found.confirmed:
            self._books.decide("wait", found.evidence)
            return
        node = self._peers.node_of(found.worker)
        self._fault("straggler", found.worker, self._members.rank_of(found.worker), node, found.evidence)
        if self._rendezvous.spares:
            self._rendezvous.bar(found.worker)
            self._generations.pause("straggler")

    # What is said beforehand.

    def node_goes(self, node: str, source: str, deadline_s: float) -> None:
        """A node is about to go: its state is kept, and its workers give their ranks to others."""
        gone = self._peers.on(node)
        if not gone or self._outcasts.is_out(node):
            return
        evidence = f"{source}: {node} goes in {deadline_s:.0f} s"
        self._fault("preemption", gone[0], self._members.rank_of(gone[0]), node, evidence)
        self._books.decide("persist", evidence)
        self._persister.request()
        if self._outcasts.bar_node(node) and any(self._members.rank_of(worker) >= 0 for worker in gone):
            self._generations.pause("preemption")

    def worker_goes(self, hello: say.Hello, notice: say.Noticed) -> None:
        """A worker was told to end: its state is kept, and its rank given to another where there is one."""
        worker, rank = hello.worker, self._members.rank_of(hello.worker)
        evidence = f"{notice.source}: {worker} goes within {notice.deadline_s:.0f} s"
        self._fault("preemption", worker, rank, hello.node, evidence)
        self._books.decide("persist", evidence)
        self._persister.request()
        if self._outcasts.bar([worker]) and self._members.rank_of(worker) >= 0:
            self._generations.pause("preemption")

    # What members say.

    def said(self, worker: str, message: say.Say) -> None:
        """What a rank found out by itself: a step that was no number, a replica with other bits."""
        about: dict[str, Any] = {"worker": worker} | message.about
        if message.kind == "note":
            self._books.tell("note", str(about.get("text", "")))
        if message.kind == "fault_seen":
            members, rank = self._rendezvous.current.members, about.get("rank", -1)
            named = 0 <= rank < len(members)
            about["worker"] = members[rank] if named else worker
            if about.get("fault") == "corruption" and named:
                self._rendezvous.bar(members[rank])
                self._outcasts.judge(members[rank], "corruption", about.get("evidence", ""))
        self._books.log(message.kind, **about)

    def first_out(self, peer: Peer, message: say.Out) -> None:
        """The first member that left a running generation says why."""
        if message.why == "pause":
            self._generations.paused()
        elif message.why == "rollback":
            self._roll_back(message)
        elif message.why == "bug":
            self._bug(peer.hello, message)
        else:
            # Its neighbour died, or the network broke. The neighbour's own connection says which, in a moment.
            self._generations.end("fault")
            self._spawn(self._blame_network(self._rendezvous.current.number, peer.hello.worker, message.text))

    async def _blame_network(self, generation: int, worker: str, text: str) -> None:
        """A collective failed, and nobody has died: that is a fault too, and may not go on for ever."""
        await asyncio.sleep(_BLAME_S)
        if self._books.faulty_generation != generation and self._ending.verdict is None:
            rank, node = self._members.rank_of(worker), self._peers.node_of(worker)
            self._fault("partition", worker, rank, node, text[:300])
            self._judge(None, text)

    def _roll_back(self, message: say.Out) -> None:
        if message.skip:
            self._past.skips.append(message.skip)
            about = {"worker": "", "rank": -1, "node": "", "step": message.step}
            self._books.log("fault_seen", fault="spike", evidence=message.text, **about)
        self._past.at_most = message.rollback_to
        self._persister.undo()
        self._books.log("rollback", from_step=message.step, to_step=message.rollback_to, skip=message.skip)
        self._books.decide("rollback", message.text)
        self._books.tell("rollback", message.text)
        self._generations.end("rollback")

    def _bug(self, hello: say.Hello, message: say.Out) -> None:
        self._fault("exception", hello.worker, self._members.rank_of(hello.worker), hello.node, message.text)
        self._books.log("traceback", worker=hello.worker, text=message.trace)
        exception, frame, step = message.key.rsplit("|", 2)
        self._judge(BugKey(exception, frame, int(step)), message.text, message.batch)
        self._generations.end("fault")

    # What every fault does.

    def _fault(self, fault: str, worker: str, rank: int, node: str, evidence: str) -> None:
        self._persister.fault()
        generation = self._rendezvous.current.number
        enough = self._books.fault(fault, generation, worker=worker, rank=rank, node=node, evidence=evidence)
        if fault not in _NOT_THE_NODES:
            self._outcasts.judge(worker, fault, evidence)
        if enough:
            self._ending.fail_now(enough)

    def _judge(self, key: BugKey | None, text: str, batch: int = -1) -> None:
        """After a fault: the next generation, unless it is a bug, or nothing gets further."""
        judged = self._books.judge(key, text, batch)
        if judged.action == "stop":
            fix = "the ledger has its traceback; the same command goes on from there" if key else "see the ledger"
            where = f"step {self._books.step}"
            self._ending.give_up({"type": "TigerError", "what": judged.evidence, "where": where, "fix": fix})
        if judged.action == "quarantine":
            self._past.skips.append([batch, batch])
            self._books.decide("skip", judged.evidence)
