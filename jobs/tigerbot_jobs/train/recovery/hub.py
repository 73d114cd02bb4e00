"""The hub: in the driver, one TCP server that every worker and keeper holds a line to.

A process that dies closes its socket, and the hub knows within a millisecond; one that is stuck goes quiet, and the
watch names it. Then the hub calls the generation off, waits until every living member is out, finds the newest whole
state, and forms the next generation from the survivors and the spares. It is the only one that decides, and every
decision goes to the ledger. It knows nothing about Ray, models or storage: those are the callables it is given; lines are
`peers.py`'s, who holds which rank `rendezvous.py`'s, faults and budgets `books.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tigerbot_jobs.train.ledger import Ledger
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.inventory import Restored, choose, newest_whole
from tigerbot_jobs.train.recovery.peers import Peer, Peers
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.rendezvous import Generation, Phase, Rendezvous
from tigerbot_jobs.train.recovery.suspects import Finding, Suspects
from tigerbot_jobs.train.watch.beats import Beat
from tigerbot_jobs.train.watch.bugs import BugKey
from tigerbot_jobs.train.watch.hangs import Hang, HangWatch

_TICK_S = 0.05
_FAULT_OF_HANG = {"node": "node", "partition": "partition", "collective": "partition", "shared": "storage"}
_CHECK_S = 0.25  # the watch looks at every member


@dataclass(frozen=True)
class Verdict:
    """How a run ended: `done`, `failed` with an error's parts, or `killed`."""

    reason: str
    error: dict[str, str] | None = None


@dataclass(frozen=True)
class HubSettings:
    """Bounds of a run's recovery. Times in seconds.

    Attributes:
        low, high: workers that may train.
        expected: workers that Ray was asked for, standbys among them.
        start_wait_s: how long the first generation waits for its full size.
        out_wait_s: how long a living member may take to leave an ended generation before it is ended.
        max_failures: faults until the run stops; -1: as many as there are, while there is progress.
        silence_s: without a heartbeat for so long, a worker is frozen or its node is gone.
    """

    low: int
    high: int
    expected: int
    token: str
    start_wait_s: float = 60.0
    out_wait_s: float = 10.0
    max_failures: int = -1
    silence_s: float = 5.0
    hang_floor_s: Mapping[str, float] | None = None


class Hub:
    """Rendezvous, heartbeats and decisions of one run.

    Args:
        settings: bounds.
        ledger: where everything is written down.
        persister: keeps snapshots in storage, and finds what is there.
        on_row: of every metrics row that rank 0 logs. All callables are called from the hub's thread and must not block.
        on_node: a node has a worker and wants a keeper.
        on_fault: (node, kind, evidence) of every fault that has a node: whether that node is to be kept out from now on.
        on_event: of what a person may want to hear: rollback, note.
        generation, history: of the earlier lives of this run.
    """

    def __init__(
        self,
        settings: HubSettings,
        ledger: Ledger,
        persister: Persister,
        *,
        on_row: Callable[[dict[str, Any]], None],
        on_node: Callable[[say.Hello], None],
        on_fault: Callable[[str, str, str], bool] = lambda node, kind, evidence: False,
        on_event: Callable[[str, str], None] = lambda event, detail: None,
        generation: int = 0,
        history: list[Restored] | None = None,
    ) -> None:
        self._settings, self._persister = settings, persister
        self._on_row, self._on_node, self._on_fault = on_row, on_node, on_fault
        self._peers = Peers(settings.token, self)
        self._books = Books(ledger, settings.max_failures, on_event)
        self._rendezvous = Rendezvous(settings.low, settings.high, generation)
        self._watch = HangWatch(floor_s=settings.hang_floor_s, silence_s=settings.silence_s)
        self._suspects = Suspects()
        self._kept_out: set[str] = set()  # nodes
        self._full = min(settings.high, settings.expected)  # what the cluster can hold
        self._history = list(history or [])
        # Of the generation there is, or is to be.
        self._reason = "start"
        self._restored: set[str] = set()
        self._done: set[str] = set()
        self._told = self._pause_generation = -1
        self._paused_for = ""
        self._at_most: int | None = None  # no later step may be taken: a rollback
        self._skips: list[list[int]] = []
        self._guard: dict[str, Any] = {}
        self._header: dict[str, Any] | None = None  # of the last snapshot that was to be kept
        self._began = time.monotonic()
        self._ended_at = self._formed_at = self._checked_at = 0.0
        # The end.
        self._leaving = False  # persist, then stop: Ctrl-C, or a failure
        self._verdict: Verdict | None = None
        self._kept = False  # the newest state is in storage, or nobody wants it: shared memory may be cleared
        self._finished, self._started = threading.Event(), threading.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="hub")
        self._host = self._address = ""
        persister.persist_on, persister.ask_for_snapshot = self._peers.ask_node, self._ask_for_snapshot
        persister.log = self._books.log

    # For the driver.

    def start(self, host: str) -> str:
        """Listen on a free port of `host`; the address to give to workers and keepers."""
        self._host = host
        self._thread.start()
        self._started.wait()
        return self._address

    def wait(self, timeout_s: float) -> Verdict | None:
        """The verdict, if there is one within `timeout_s`."""
        self._finished.wait(timeout_s)
        return self._verdict

    def node_going(self, ray_node: str, source: str, deadline_s: float) -> None:
        """Ray, or whoever knows, says that a node will go."""
        names = {one.hello.node for one in self._peers.workers.copy().values() if one.hello.ray_node == ray_node}
        for node in names:
            self._loop.call_soon_threadsafe(self._noticed, node, source, deadline_s)

    def leave(self) -> None:
        """Snapshot, persist, then stop: the run is to go on another time."""
        self._loop.call_soon_threadsafe(self._leave)

    def drop(self) -> None:
        """Stop, and keep nothing: the run will not go on."""
        self._loop.call_soon_threadsafe(self._drop)

    def close(self) -> None:
        """Stop everybody, and the hub."""
        self._loop.call_soon_threadsafe(self._conclude, Verdict("killed"))
        self._thread.join(timeout=5)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._books.step

    # The thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._started.set()
            self._finished.set()

    async def _serve(self) -> None:
        server, self._address = await self._peers.listen(self._host)
        self._started.set()
        async with server:
            while self._verdict is None:
                await asyncio.sleep(_TICK_S)
                self._tick()
            await self._peers.stop(say.KEPT if self._kept else self._verdict.reason)
            self._finished.set()
            await asyncio.sleep(0.2)  # the stops are on their way
        self._peers.close()
        for task in self._tasks:
            task.cancel()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(others, timeout=1) if others else None
        await self._loop.shutdown_default_executor()  # a commit under way ends before anybody goes on with the run

    # What the lines say.

    def worker_joined(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.node in self._kept_out:
            self._rendezvous.bar(hello.worker)
        self._books.log("worker_joined", worker=hello.worker, host=hello.host, node=hello.node, pid=hello.pid)
        if self._verdict is not None:
            peer.send(say.Stop(self._verdict.reason))

    def worker_left(self, peer: Peer) -> None:
        hello, evidence = peer.hello, "its connection closed"
        self._watch.forget(hello.worker)
        if self._verdict is not None:
            return
        rank = self._rank_of(hello.worker)
        ended = self._rendezvous.lost(hello.worker)
        if rank >= 0 and not self._leaving:
            self._fault("process", hello.worker, rank, hello.node, evidence)
        if ended:
            self._judge(None, f"{hello.worker}: {evidence}")
            self._end("fault")

    def keeper_left(self, node: str) -> None:
        self._watch.keeper_gone(node)

    def wants_keeper(self, hello: say.Hello) -> None:
        if self._verdict is None:
            self._on_node(hello)

    def took(self, peer: Peer, message: say.Message) -> None:
        worker, hello = peer.hello.worker, peer.hello
        match message:
            case say.Pulse():
                self._pulse(peer, message)
            case say.Ready():
                self._books.log("worker_ready", worker=worker, host=hello.host, node=hello.node, pid=hello.pid)
                self._rendezvous.ready(worker)
                self._gather()
            case say.Out():
                self._member_out(peer, message)
            case say.Say():
                self._said(worker, message)
            case say.Noticed() if hello.role == "worker":
                self._worker_goes(peer, message)
            case say.Noticed():
                self._noticed(hello.node, message.source, message.deadline_s)
            case say.Meet() | say.Formed() | say.Restored() | say.Saved() | say.Probed():
                if self._rendezvous.is_member(worker, message.generation):  # the fence
                    self._member_said(peer, message)

    def _member_said(self, peer: Peer, message: say.Message) -> None:
        worker = peer.hello.worker
        match message:
            case say.Meet():
                for member in self._members():
                    if member is not peer:
                        member.send(message)
            case say.Formed() if self._rank_of(worker) == 0:
                self._books.log("group_formed", generation=message.generation, seconds=message.seconds)
            case say.Restored():
                self._member_restored(worker, message)
            case say.Saved():
                self._header = message.header
                self._persister.saved(peer.hello.node, self._rank_of(worker), message)
            case say.Probed():
                for found in self._suspects.probed(worker, message.seconds):
                    self._suspected(found)

    def _pulse(self, peer: Peer, pulse: say.Pulse) -> None:
        worker, node = peer.hello.worker, peer.hello.node
        if peer.hello.role == "keeper":
            self._watch.keeper_heard(node)
            return
        if not self._rendezvous.is_member(worker, pulse.generation):
            return
        if self._rendezvous.phase is Phase.RUNNING:
            about = (worker, pulse.rank, pulse.generation, pulse.step, pulse.phase, pulse.seq)
            self._watch.beat(Beat(*about, in_phase_s=pulse.in_phase_s, cpu_s=pulse.cpu_s, node=node))
        for _, own_s in pulse.own:
            self._suspects.add(worker, own_s)
        if pulse.steps:
            self._books.steps(pulse.generation, self._rendezvous.current.world_size, pulse.steps)
        for row in pulse.rows:
            self._on_row(row)

    def _said(self, worker: str, message: say.Say) -> None:
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
                self._keep_out(members[rank], "corruption", about.get("evidence", ""))
        self._books.log(message.kind, **about)

    # Beginning and ending generations.

    def _gather(self) -> None:
        if self._verdict is not None or self._leaving:
            return
        first = self._rendezvous.current.number == 0 or self._reason == "start"
        patient = first and time.monotonic() - self._began < self._settings.start_wait_s
        generation = self._rendezvous.next_generation(wait_for=self._full if patient else 0)
        if generation is not None:
            self._spawn(self._form(generation))

    async def _form(self, generation: Generation) -> None:
        reason, began = self._reason, time.monotonic()
        before = self._restored
        self._restored, self._done = set(), set()
        self._formed_at = began
        self._books.log(
            "generation",
            generation=generation.number,
            world_size=generation.world_size,
            members=list(generation.members),
            reason=reason,
        )
        if before and reason == "fault":
            action = "replace" if generation.world_size == len(before) else "shrink"
            self._books.decide(action, f"{generation.world_size} of {self._settings.high} workers train on")
        if self._history:
            # An earlier life may have left its state in memory, which only a keeper sees; a new run has nothing there.
            await self._peers.keepers_of(generation.members, timeout_s=20.0 if reason == "start" else 2.0)
        shards = newest_whole(await self._peers.look(), self._history, at_most=self._at_most)
        stored = await self._persister.newest(self._at_most)
        if generation != self._rendezvous.current or self._rendezvous.phase is not Phase.RUNNING:
            return  # called off meanwhile
        begin = choose(shards, stored)
        self._at_most = None
        self._watch.new_generation(generation.number, generation.members)
        self._told = generation.number
        self._suspects.new_generation(generation.members)
        for rank, worker in enumerate(generation.members):
            peer = self._peers.workers.get(worker)
            if peer is not None:
                peer.send(
                    replace(
                        begin,
                        generation=generation.number,
                        rank=rank,
                        world_size=generation.world_size,
                        skips=self._skips,
                        guard=self._guard,
                    )
                )

    def _member_restored(self, worker: str, message: say.Restored) -> None:
        if not self._restored:
            self._history.append(Restored(message.generation, message.step))
            self._books.step = message.step
        self._restored.add(worker)
        if self._restored >= set(self._rendezvous.current.members):
            self._books.log(
                "restored",
                generation=message.generation,
                step=message.step,
                tier=message.tier,
                seconds=message.seconds,
            )
            self._reason = "fault"

    def _end(self, reason: str) -> None:
        """Call the current generation off."""
        self._reason, self._ended_at = reason, time.monotonic()
        self._persister.forget()
        for member in self._members():
            member.send(say.Abort(self._rendezvous.current.number))
        self._gather()

    def _member_out(self, peer: Peer, message: say.Out) -> None:
        worker = peer.hello.worker
        if message.error is not None and (
            message.generation == 0 or self._rendezvous.is_member(worker, message.generation)
        ):
            self._spawn(self._keep_then(Verdict("failed", message.error)))
            return
        if not self._rendezvous.is_member(worker, message.generation):
            return
        self._rendezvous.out(worker)
        if message.why == "done":
            self._done.add(worker)
            if self._done >= {m for m in self._rendezvous.current.members if m}:
                self._spawn(self._finish())
            return
        self._guard = message.guard or self._guard
        if self._rendezvous.phase is Phase.RUNNING:
            self._rendezvous.end()
            self._first_out(peer, message)
        self._gather()

    def _first_out(self, peer: Peer, message: say.Out) -> None:
        worker = peer.hello.worker
        if message.why == "pause":
            self._end(self._paused_for or "grow")
        elif message.why == "rollback":
            self._roll_back(message)
        elif message.why == "bug":
            self._bug(peer, message)
        else:
            # Its neighbour died, or the network broke. The neighbour's own connection says which, in a moment.
            self._end("fault")
            self._spawn(self._blame_network(self._rendezvous.current.number, worker, message.text))

    async def _blame_network(self, generation: int, worker: str, text: str) -> None:
        """A collective failed, and nobody has died: that is a fault too, and may not go on for ever."""
        await asyncio.sleep(0.5)
        if self._books.faulty_generation != generation and self._verdict is None:
            self._fault("partition", worker, self._rank_of(worker), self._peers.node_of(worker), text[:300])
            self._judge(None, text)

    def _roll_back(self, message: say.Out) -> None:
        if message.skip:
            self._skips.append(message.skip)
            about = {"worker": "", "rank": -1, "node": "", "step": message.step}
            self._books.log("fault_seen", fault="spike", evidence=message.text, **about)
        self._at_most = message.rollback_to
        self._persister.undo()
        self._books.log("rollback", from_step=message.step, to_step=message.rollback_to, skip=message.skip)
        self._books.decide("rollback", message.text)
        self._books.tell("rollback", message.text)
        self._end("rollback")

    def _bug(self, peer: Peer, message: say.Out) -> None:
        hello = peer.hello
        self._fault("exception", hello.worker, self._rank_of(hello.worker), hello.node, message.text)
        self._books.log("traceback", worker=hello.worker, text=message.trace)
        exception, frame, step = message.key.rsplit("|", 2)
        self._judge(BugKey(exception, frame, int(step)), message.text, message.batch)
        self._end("fault")

    def _judge(self, key: BugKey | None, text: str, batch: int = -1) -> None:
        """After a fault: the next generation, unless it is a bug, or nothing gets further."""
        judged = self._books.judge(key, text, batch)
        if judged.action == "stop":
            self._leaving = True
            error = {"type": "TigerError", "what": judged.evidence, "where": f"step {self._books.step}"}
            fix = "the ledger has its traceback; the same command goes on from there" if key else "see the ledger"
            self._spawn(self._keep_then(Verdict("failed", error | {"fix": fix})))
        if judged.action == "quarantine":
            self._skips.append([batch, batch])
            self._books.decide("skip", judged.evidence)

    def _fault(self, fault: str, worker: str, rank: int, node: str, evidence: str) -> None:
        self._persister.fault()
        generation = self._rendezvous.current.number
        enough = self._books.fault(fault, generation, worker=worker, rank=rank, node=node, evidence=evidence)
        if fault not in ("preemption", "exception", "storage", "straggler"):
            self._keep_out(worker, fault, evidence)
        if enough:
            self._conclude(Verdict("failed", {"type": "TigerError", "what": enough, "where": "", "fix": ""}))

    # Every 50 ms.

    def _tick(self) -> None:
        now = time.monotonic()
        # Until its members were told, a generation beats in the name of the one before: nobody is silent by that.
        told = self._rendezvous.phase is Phase.RUNNING and self._told == self._rendezvous.current.number
        if told and now - self._checked_at >= _CHECK_S:
            self._checked_at = now
            self._look_around()
        if self._rendezvous.awaited and now - self._ended_at > self._settings.out_wait_s:
            self._ended_at = now
            for worker in self._rendezvous.awaited:
                self._end_worker(worker, "did not leave the generation that was called off")
        if self._rendezvous.wants_to_grow and self._all_restored() and now - self._formed_at > 1.0:
            self._pause("grow")
        if self._rendezvous.phase is not Phase.RUNNING:
            self._gather()
        elif not self._leaving:
            self._persister.tick()

    def _look_around(self) -> None:
        """Who hangs, and who is slow."""
        for hang in self._watch.check():
            self._hung(hang)
        if self._suspects.check():
            for member in self._members():
                member.send(say.Probe(self._rendezvous.current.number))

    def _all_restored(self) -> bool:
        return self._restored >= {m for m in self._rendezvous.current.members if m} != set()

    def _pause(self, why: str) -> None:
        if self._pause_generation == self._rendezvous.current.number:
            return
        self._paused_for, self._pause_generation = why, self._rendezvous.current.number
        text = f"the generation leaves at its next step boundary ({why})"
        self._books.decide("grow" if why == "grow" else "wait", text)
        for member in self._members():
            member.send(say.Pause(self._rendezvous.current.number))

    def _hung(self, hang: Hang) -> None:
        worker = hang.worker or ""
        rank = hang.rank if hang.rank is not None else -1
        self._fault(_FAULT_OF_HANG.get(hang.kind, "hang"), worker, rank, hang.node or "", hang.evidence)
        if hang.kind in ("partition", "shared", "unheard") and hang.times == 1:
            self._books.decide("wait", hang.evidence)  # ending a generation would not mend it
            return
        self._rendezvous.end()
        keeper = self._peers.keepers.get(self._peers.node_of(worker))
        if keeper is not None and time.monotonic() - keeper.seen > self._settings.silence_s:
            self._peers.drop_keeper(keeper.hello.node)
        if worker:
            self._end_worker(worker, hang.evidence)
        self._judge(None, hang.evidence)
        self._end("fault")

    def _end_worker(self, worker: str, reason: str) -> None:
        """A worker that does not answer is killed by its node's keeper, and is lost whether that succeeds or not."""
        peer = self._peers.workers.get(worker)
        if peer is not None:
            self._books.decide("kill", f"{worker}: {reason}")
            keeper = self._peers.condemn(worker)
            if keeper is not None:
                self._spawn(self._kill(keeper, peer.hello, reason))
        self._watch.forget(worker)
        self._rendezvous.lost(worker)

    async def _kill(self, keeper: Peer, hello: say.Hello, reason: str) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            answer = await self._peers.ask(keeper, lambda request: say.Kill(request, hello.pid, reason), 5.0)
            self._books.log("stacks", worker=hello.worker, stacks=answer.stacks[-4000:])

    def _suspected(self, found: Finding) -> None:
        """The second sign on a slow rank is in."""
        if not found.confirmed:
            self._books.decide("wait", found.evidence)
            return
        node = self._peers.node_of(found.worker)
        self._fault("straggler", found.worker, self._rank_of(found.worker), node, found.evidence)
        if self._rendezvous.spares:
            self._rendezvous.bar(found.worker)
            self._pause("straggler")

    def _noticed(self, node: str, source: str, deadline_s: float) -> None:
        """A node is about to go: its state is kept, and its workers give their ranks to others."""
        gone = self._peers.on(node)
        if not gone or node in self._kept_out:
            return
        evidence = f"{source}: {node} goes in {deadline_s:.0f} s"
        self._fault("preemption", gone[0], self._rank_of(gone[0]), node, evidence)
        self._books.decide("persist", evidence)
        self._persister.request()
        if self._bar_node(node) and any(self._rank_of(worker) >= 0 for worker in gone):
            self._pause("preemption")

    def _worker_goes(self, peer: Peer, message: say.Noticed) -> None:
        """A worker was told to end: its state is kept, and its rank given to another where there is one."""
        worker = peer.hello.worker
        evidence = f"{message.source}: {worker} goes within {message.deadline_s:.0f} s"
        self._fault("preemption", worker, self._rank_of(worker), peer.hello.node, evidence)
        self._books.decide("persist", evidence)
        self._persister.request()
        if self._bar([worker]) and self._rank_of(worker) >= 0:
            self._pause("preemption")

    def _keep_out(self, worker: str, fault: str, evidence: str) -> None:
        """A node that fails repeatedly gets no ranks, unless there would be too few without it."""
        node = self._peers.node_of(worker)
        if node and self._on_fault(node, fault, evidence) and self._bar_node(node):
            self._books.decide("quarantine", f"{node}: {evidence}")

    def _bar_node(self, node: str) -> bool:
        """Give this node's workers no rank any more; not where too few would be left: it is used until it goes."""
        if not self._bar(self._peers.on(node)):
            return False
        self._kept_out.add(node)
        return True

    def _bar(self, workers: list[str]) -> bool:
        left = [one for one in self._peers.workers if one not in workers and not self._rendezvous.is_barred(one)]
        if len(left) < self._settings.low:
            return False
        for worker in workers:
            self._rendezvous.bar(worker)
        return True

    # The end.

    def _leave(self) -> None:
        if self._verdict is not None:
            return
        if self._rendezvous.phase is not Phase.RUNNING or not self._all_restored():
            self._conclude(Verdict("killed"))
            return
        self._leaving = True
        self._persister.request()
        self._spawn(self._leave_when_kept())

    def _drop(self) -> None:
        self._kept = self._kept or self._verdict is None
        self._conclude(Verdict("killed"))

    async def _leave_when_kept(self) -> None:
        self._kept = not await self._persister.settled(timeout_s=15)
        self._conclude(Verdict("killed"))

    async def _keep_then(self, verdict: Verdict) -> None:
        """Put the newest state that is whole into storage, dead workers' too, then stop."""
        shards = newest_whole(await self._peers.look(), self._history, at_most=self._at_most)
        if shards and self._header and shards[0].step > self._persister.kept_step:
            one = shards[0]
            about = {"step": one.step, "world_size": one.world_size, "zero_stage": one.zero_stage}
            self._persister.keep_shards(shards, self._header | about)
            await self._persister.settled(timeout_s=60)
        self._kept = bool(shards) and self._persister.kept_step >= shards[0].step
        self._conclude(verdict)

    def _ask_for_snapshot(self) -> None:
        members = self._rendezvous.current.members
        if self._rendezvous.phase is Phase.RUNNING and members and members[0] in self._peers.workers:
            self._peers.workers[members[0]].send(say.Save(self._rendezvous.current.number))

    async def _finish(self) -> None:
        """Every member is done: the last state is to be in storage before anybody may leave."""
        problem = await self._persister.settled(timeout_s=600)
        if problem:
            self._conclude(Verdict("failed", {"type": "StorageError", "what": problem, "where": "", "fix": ""}))
        else:
            self._kept = True
            self._conclude(Verdict("done"))

    def _conclude(self, verdict: Verdict) -> None:
        if self._verdict is not None:
            return
        self._verdict = verdict
        error = verdict.error["what"] if verdict.error else None
        if verdict.reason == "failed":
            self._books.decide("stop", error or "")
        self._books.log("stopped", reason=verdict.reason, error=error)

    # Small things.

    def _members(self) -> list[Peer]:
        workers = self._peers.workers
        return [workers[member] for member in self._rendezvous.current.members if member in workers]

    def _rank_of(self, worker: str) -> int:
        members = self._rendezvous.current.members
        return members.index(worker) if worker in members else -1

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            what = f"the hub failed: {task.exception()!r}"
            self._conclude(Verdict("failed", {"type": "TigerError", "what": what, "where": "", "fix": ""}))
