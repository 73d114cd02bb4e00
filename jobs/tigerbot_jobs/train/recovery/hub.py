"""The hub: in the driver, one TCP server that every worker and keeper holds a line to.

A process that dies closes its socket, and the hub knows within a millisecond; one that is stuck goes quiet, and the
watch names it. Then the hub calls the generation off, waits until every living member is out, finds the newest whole
state, and forms the next generation from the survivors and the spares. It is the only one that decides, and every
decision goes to the ledger. It knows nothing about Ray, models or storage: those are the callables it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from tigerbot_jobs.train.ledger import Ledger
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.inventory import Restored, newest_whole
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.rendezvous import Generation, Phase, Rendezvous
from tigerbot_jobs.train.watch.beats import Beat
from tigerbot_jobs.train.watch.bugs import BugKey, BugMemory
from tigerbot_jobs.train.watch.hangs import Hang, HangWatch
from tigerbot_jobs.train.watch.stragglers import Mark, SlowRanks, confirm

_TICK_S = 0.05
_CHECK_S = 0.25  # the watch looks at every member
_HELLO_S = 10.0


@dataclass(frozen=True)
class Verdict:
    """How a run ended: `done`, `failed` with an error's parts, or `killed`."""

    reason: str
    error: dict[str, str] | None = None


@dataclass
class Peer:
    """One connection."""

    hello: say.Hello
    writer: asyncio.StreamWriter
    seen: float
    asked: set[asyncio.Future[Any]] = field(default_factory=set)  # what it has not answered yet

    def send(self, message: say.Message) -> None:
        with contextlib.suppress(Exception):
            self.writer.write(say.encode(message))


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
        on_row: of every metrics row that rank 0 logs; called from the hub's thread.
        on_fault: (node, kind, evidence) of every fault that has a node: whether that node is to be kept out from now on.
        on_event: of what a person may want to hear: rollback, stop; called from the hub's thread, must not block.
        on_node: a node was seen for the first time and wants a keeper; called from the hub's thread, must not block.
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
        self._settings, self._ledger, self._persister = settings, ledger, persister
        self._on_row, self._on_node, self._on_fault, self._on_event = on_row, on_node, on_fault, on_event
        self._slow = SlowRanks()
        self._probes: dict[str, float] = {}
        self._suspects: dict[str, str] = {}  # slow by their own times, until a probe says more
        self._kept_out: set[str] = set()
        self._checked_at = 0.0
        self._rendezvous = Rendezvous(settings.low, settings.high, generation)
        self._full = min(settings.high, settings.expected)  # what the cluster can hold
        self._history = list(history or [])
        self._workers: dict[str, Peer] = {}
        self._keepers: dict[str, Peer] = {}  # by node
        self._condemned: set[str] = set()  # workers that a keeper kills: they are not let in again
        self._nodes: dict[str, str] = {}  # that have a keeper, or will have: Ray's id of each
        self._watch = HangWatch(floor_s=settings.hang_floor_s, silence_s=settings.silence_s)
        self._bugs = BugMemory()
        self._faults = 0
        self._began = time.monotonic()
        self._ended_at = 0.0
        self._reason = "start"
        self._restored: set[str] = set()
        self._done: set[str] = set()
        self._step = 0
        self._skips: list[list[int]] = []
        self._guard: dict[str, Any] = {}
        self._at_most: int | None = None
        self._paused_for = ""
        self._leaving = False  # persist, then stop: Ctrl-C, or the end
        self._formed_at = 0.0
        self._faulted_in = self._pause_generation = self._told = -1
        self._steps_since_fault = self._furthest = self._request_number = 0
        self._verdict: Verdict | None = None
        self._kept = False  # the newest state is in storage: shared memory may be cleared
        self._finished = threading.Event()
        self._requests: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="hub")
        self._header: dict[str, Any] | None = None
        persister.persist_on, persister.ask_for_snapshot, persister.log = (
            self.persist_on,
            self._ask_for_snapshot,
            self._log,
        )
        self._address: asyncio.Future[str] = self._loop.create_future()
        self._started = threading.Event()

    # For the driver.

    def start(self, host: str) -> str:
        """Listen on a free port of `host`; the address to give to workers and keepers."""
        self._host = host
        self._thread.start()
        self._started.wait()
        return self._address.result()

    def wait(self, timeout_s: float) -> Verdict | None:
        """The verdict, if there is one within `timeout_s`."""
        self._finished.wait(timeout_s)
        return self._verdict

    def node_going(self, ray_node: str, source: str, deadline_s: float) -> None:
        """Ray, or whoever knows, says that a node will go."""
        names = {one.hello.node for one in self._workers.copy().values() if one.hello.ray_node == ray_node}
        for node in names:
            self._loop.call_soon_threadsafe(self._noticed, node, source, deadline_s)

    def leave(self) -> None:
        """Snapshot, persist, then stop: the run is to go on another time."""
        self._loop.call_soon_threadsafe(self._leave)

    def close(self) -> None:
        """Stop everybody, and the hub."""
        self._loop.call_soon_threadsafe(self._conclude, Verdict("killed"))
        self._thread.join(timeout=5)

    @property
    def step(self) -> int:
        return self._step

    @property
    def workers(self) -> dict[str, say.Hello]:
        return {name: peer.hello for name, peer in self._workers.items()}

    # The thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._finished.set()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, self._host, 0, limit=say.LINE_LIMIT)
        self._address.set_result(f"{self._host}:{server.sockets[0].getsockname()[1]}")
        self._started.set()
        async with server:
            while self._verdict is None:
                await asyncio.sleep(_TICK_S)
                self._tick()
            for peer in (*self._workers.values(), *self._keepers.values()):
                peer.send(say.Stop(say.KEPT if self._kept else self._verdict.reason))
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(peer.writer.drain(), 1)
            self._finished.set()
            await asyncio.sleep(0.2)  # the stops are on their way
        for peer in (*self._workers.values(), *self._keepers.values()):
            peer.writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(others, timeout=1) if others else None

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = None
        try:
            hello = say.decode(await asyncio.wait_for(reader.readline(), _HELLO_S))
            if not isinstance(hello, say.Hello) or not hmac.compare_digest(hello.token, self._settings.token):
                return
            if hello.worker in self._condemned:
                return
            peer = Peer(hello, writer, time.monotonic())
            self._joined(peer)
            while line := await reader.readline():
                peer.seen = time.monotonic()
                self._take(peer, say.decode(line))
        except (TimeoutError, ValueError, ConnectionError, asyncio.LimitOverrunError):
            pass  # as a connection that closed
        finally:
            writer.close()
            if peer is not None:
                self._left(peer)

    def _joined(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role == "keeper":
            self._keepers[hello.node] = peer
            self._pair_keepers()
            return
        before = self._workers.get(hello.worker)
        if before is not None:
            self._left(before)  # its line broke, and it noticed first
            before.writer.transport.abort()
        self._workers[hello.worker] = peer
        if hello.node in self._kept_out:
            self._rendezvous.bar(hello.worker)
        self._log("worker_joined", worker=hello.worker, host=hello.host, node=hello.node, pid=hello.pid)
        if self._nodes.get(hello.node) != hello.ray_node:
            self._nodes[hello.node] = hello.ray_node
            self._on_node(hello)
        if self._verdict is not None:
            peer.send(say.Stop(self._verdict.reason))

    def _left(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role == "keeper":
            if self._keepers.get(hello.node) is peer:
                self._drop_keeper(hello.node)
                neighbour = next((w.hello for w in self._workers.values() if w.hello.node == hello.node), None)
                if self._verdict is None and neighbour is not None:
                    self._nodes[hello.node] = neighbour.ray_node
                    self._on_node(neighbour)
            return
        if self._workers.get(hello.worker) is not peer:
            return  # it was ended, or has come back on another line
        del self._workers[hello.worker]
        self._watch.forget(hello.worker)
        if self._verdict is None:
            self._worker_lost(hello, "process", "its connection closed")

    def _drop_keeper(self, node: str) -> None:
        """Nobody asks this keeper any more, nobody sends it copies, and nobody waits for its answers."""
        self._nodes.pop(node, None)
        keeper = self._keepers.pop(node, None)
        if keeper is None:
            return
        self._pair_keepers()
        self._watch.keeper_gone(node)
        keeper.writer.transport.abort()
        for future in keeper.asked:
            if not future.done():
                future.set_exception(ConnectionResetError(f"the keeper of {node} is gone"))

    def _worker_lost(self, hello: say.Hello, fault: str, evidence: str) -> None:
        rank = self._rank_of(hello.worker)
        ended = self._rendezvous.lost(hello.worker)
        if rank >= 0 and not self._leaving:
            self._fault(fault, hello.worker, rank, hello.node, evidence)
        if ended:
            self._judge(None, f"{hello.worker}: {evidence}")

    def _take(self, peer: Peer, message: say.Message) -> None:
        worker = peer.hello.worker
        match message:
            case say.Pulse():
                self._pulse(peer, message)
            case say.Ready():
                self._log("worker_ready", worker=worker, host=peer.hello.host, node=peer.hello.node, pid=peer.hello.pid)
                self._rendezvous.ready(worker)
                self._gather()
            case say.Meet() if self._rendezvous.is_member(worker, message.generation):
                for member in self._members():
                    if member is not peer:
                        member.send(message)
            case say.Formed() if self._rendezvous.is_member(worker, message.generation):
                if self._rank_of(worker) == 0:
                    self._log("group_formed", generation=message.generation, seconds=message.seconds)
            case say.Restored() if self._rendezvous.is_member(worker, message.generation):
                self._member_restored(worker, message)
            case say.Saved() if self._rendezvous.is_member(worker, message.generation):
                self._header = message.header
                self._persister.saved(peer.hello.node, self._rank_of(worker), message)
            case say.Out():
                self._member_out(peer, message)
            case say.Say():
                self._said(worker, message)
            case say.Noticed():
                self._noticed(peer.hello.node, message.source, message.deadline_s)
            case say.Probed() if self._rendezvous.is_member(worker, message.generation):
                self._probed(worker, message.seconds)
            case say.Held() | say.Put() | say.Killed():
                future = self._requests.pop(message.request, None)
                if future is not None and not future.done():
                    future.set_result(message)

    def _pulse(self, peer: Peer, pulse: say.Pulse) -> None:
        if peer.hello.role == "keeper":
            self._watch.keeper_heard(peer.hello.node)
            return
        worker = peer.hello.worker
        if not self._rendezvous.is_member(worker, pulse.generation):
            return
        if self._rendezvous.phase is Phase.RUNNING:
            about = (worker, pulse.rank, pulse.generation, pulse.step, pulse.phase, pulse.seq)
            self._watch.beat(Beat(*about, in_phase_s=pulse.in_phase_s, cpu_s=pulse.cpu_s, node=peer.hello.node))
        for _, own_s in pulse.own:
            self._slow.add(worker, own_s)
        if pulse.steps:
            self._step = int(pulse.steps[-1][0])
            # New ones only: between a state and a bug there may be steps that are done again each time.
            self._steps_since_fault += sum(row[0] > self._furthest for row in pulse.steps)
            self._furthest = max(self._furthest, self._step)
            self._log(
                "steps",
                generation=pulse.generation,
                world_size=self._rendezvous.current.world_size,
                rows=pulse.steps,
            )
        for row in pulse.rows:
            self._on_row(row)

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
        self._log(
            "generation",
            generation=generation.number,
            world_size=generation.world_size,
            members=list(generation.members),
            reason=reason,
        )
        if before and reason == "fault":
            action = "replace" if generation.world_size == len(before) else "shrink"
            self._decide(action, f"{generation.world_size} of {self._settings.high} workers train on")
        if self._history:
            # An earlier life may have left its state in memory, which only a keeper sees; a new run has nothing there.
            await self._keepers_of(generation, timeout_s=20.0 if reason == "start" else 2.0)
        shards = newest_whole(await self._look(), self._history, at_most=self._at_most)
        stored = await self._persister.newest(self._at_most)
        memory_step = shards[0].step if shards else -1
        if generation != self._rendezvous.current or self._rendezvous.phase is not Phase.RUNNING:
            return  # called off meanwhile
        if shards and memory_step >= stored.step:
            tier, step, key = "memory", memory_step, ""
        elif stored.key:
            tier, step, key, shards = "storage", stored.step, stored.key, []
        else:
            tier, step, key, shards = "none", 0, "", []
        self._at_most = None
        self._watch.new_generation(generation.number, generation.members)
        self._told = generation.number
        self._slow.new_generation(generation.members)
        self._probes, self._suspects = {}, {}
        for rank, worker in enumerate(generation.members):
            peer = self._workers.get(worker)
            if peer is None:
                continue
            peer.send(
                say.Form(
                    generation=generation.number,
                    rank=rank,
                    world_size=generation.world_size,
                    tier=tier,
                    step=step,
                    shards=shards,
                    key=key,
                    skips=self._skips,
                    guard=self._guard,
                )
            )

    def _member_restored(self, worker: str, message: say.Restored) -> None:
        if not self._restored:
            self._history.append(Restored(message.generation, message.step))
            self._step = message.step
        self._restored.add(worker)
        if self._restored >= set(self._rendezvous.current.members):
            self._log(
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
        """A collective failed, and nobody has died: that is a fault too."""
        await asyncio.sleep(0.5)
        if self._faulted_in != generation and self._verdict is None:
            peer = self._workers.get(worker)
            node = peer.hello.node if peer else ""
            self._fault("partition", worker, self._rank_of(worker), node, text[:300])

    def _roll_back(self, message: say.Out) -> None:
        if message.skip:
            self._skips.append(message.skip)
            about = {"worker": "", "rank": -1, "node": "", "step": message.step}
            self._log("fault_seen", fault="spike", evidence=message.text, **about)
        self._at_most = message.rollback_to
        self._persister.undo()
        self._log("rollback", from_step=message.step, to_step=message.rollback_to, skip=message.skip)
        self._decide("rollback", message.text)
        self._on_event("rollback", message.text)
        self._end("rollback")

    def _bug(self, peer: Peer, message: say.Out) -> None:
        self._fault("exception", peer.hello.worker, self._rank_of(peer.hello.worker), peer.hello.node, message.text)
        self._log("traceback", worker=peer.hello.worker, text=message.trace)
        exception, frame, step = message.key.rsplit("|", 2)
        self._judge(BugKey(exception, frame, int(step)), message.text, message.batch)

    def _judge(self, key: BugKey | None, text: str, batch: int = -1) -> None:
        """After a fault: the next generation, unless it is a bug, or nothing gets further."""
        judged = self._bugs.failed(
            key,
            batch=batch if batch >= 0 else None,
            steps_since=self._steps_since_fault,
            furthest=self._furthest,
            line=text,
        )
        self._steps_since_fault = 0
        if judged.action == "stop":
            self._leaving = True
            error = {"type": "TigerError", "what": judged.evidence, "where": f"step {self._step}"}
            fix = "the ledger has its traceback; the same command goes on from there" if key else "see the ledger"
            self._spawn(self._keep_then(Verdict("failed", error | {"fix": fix})))
        if judged.action == "quarantine":
            self._skips.append([batch, batch])
            self._decide("skip", judged.evidence)
        self._end("fault")

    def _fault(self, fault: str, worker: str, rank: int, node: str, evidence: str) -> None:
        self._faults += 1
        self._persister.fault()
        self._faulted_in = self._rendezvous.current.number
        self._log("fault_seen", fault=fault, worker=worker, rank=rank, node=node, step=self._step, evidence=evidence)
        if fault not in ("preemption", "exception", "storage", "straggler"):
            self._keep_out(worker, fault, evidence)
        limit = self._settings.max_failures
        if 0 <= limit < self._faults:
            what = f"training failed {self._faults} times, fault_tolerance.max_failures is {limit} (last: {evidence})"
            self._conclude(Verdict("failed", {"type": "TigerError", "what": what, "where": "", "fix": ""}))

    # Every 50 ms.

    def _tick(self) -> None:
        now = time.monotonic()
        # Until its members were told, a generation beats in the name of the one before: nobody is silent by that.
        told = self._rendezvous.phase is Phase.RUNNING and self._told == self._rendezvous.current.number
        if told and now - self._checked_at >= _CHECK_S:
            self._checked_at = now
            for hang in self._watch.check():
                self._hung(hang)
            for mark in self._slow.check():
                self._slowed(mark)
        if self._rendezvous.awaited and now - self._ended_at > self._settings.out_wait_s:
            self._ended_at = now
            for worker in self._rendezvous.awaited:
                self._end_worker(worker, "did not leave the generation that was called off")
        if self._rendezvous.wants_to_grow and self._all_restored() and now - self._formed_at > 1.0:
            self._pause("grow")
        if self._rendezvous.phase is Phase.GATHERING or self._rendezvous.phase is Phase.ENDING:
            self._gather()
        if not self._leaving and self._rendezvous.phase is Phase.RUNNING:
            self._persister.tick()

    def _all_restored(self) -> bool:
        return self._restored >= {m for m in self._rendezvous.current.members if m} != set()

    def _pause(self, why: str) -> None:
        if self._paused_for and self._pause_generation == self._rendezvous.current.number:
            return
        self._paused_for, self._pause_generation = why, self._rendezvous.current.number
        self._decide("grow" if why == "grow" else "wait", f"the generation leaves at its next step boundary ({why})")
        for member in self._members():
            member.send(say.Pause(self._rendezvous.current.number))

    def _hung(self, hang: Hang) -> None:
        worker = hang.worker or ""
        fault = {"node": "node", "partition": "partition", "collective": "partition", "shared": "storage"}
        rank = hang.rank if hang.rank is not None else -1
        self._fault(fault.get(hang.kind, "hang"), worker, rank, hang.node or "", hang.evidence)
        if hang.kind in ("partition", "shared", "unheard") and hang.times == 1:
            self._decide("wait", hang.evidence)  # ending a generation would not mend it
            return
        if self._rendezvous.phase is Phase.RUNNING:
            self._rendezvous.end()
        keeper = self._keepers.get(self._workers[worker].hello.node) if worker in self._workers else None
        if keeper is not None and time.monotonic() - keeper.seen > self._settings.silence_s:
            self._drop_keeper(keeper.hello.node)
        if worker:
            self._end_worker(worker, hang.evidence)
        self._judge(None, hang.evidence)

    def _end_worker(self, worker: str, reason: str) -> None:
        """A worker that does not answer is killed by its node's keeper, and is lost whether that succeeds or not."""
        peer = self._workers.pop(worker, None)
        if peer is None:
            self._rendezvous.lost(worker)
            return
        self._decide("kill", f"{worker}: {reason}")
        keeper = self._keepers.get(peer.hello.node)
        if keeper is not None:
            self._condemned.add(worker)
            self._spawn(self._kill(keeper, peer.hello, reason))
        self._watch.forget(worker)
        self._rendezvous.lost(worker)
        peer.writer.transport.abort()

    async def _kill(self, keeper: Peer, hello: say.Hello, reason: str) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            answer = await self._ask(keeper, lambda request: say.Kill(request, hello.pid, reason), 5.0)
            self._log("stacks", worker=hello.worker, stacks=answer.stacks[-4000:])

    def _said(self, worker: str, message: say.Say) -> None:
        """What a rank found out by itself: a step that was no number, a replica with other bits."""
        about = dict(message.about)
        if message.kind == "note":
            self._on_event("note", str(about.get("text", "")))
        if message.kind == "fault_seen":
            members, rank = self._rendezvous.current.members, about.get("rank", -1)
            about["worker"] = members[rank] if 0 <= rank < len(members) else worker
            if about.get("fault") == "corruption" and 0 <= rank < len(members):
                self._rendezvous.bar(members[rank])
                self._keep_out(about["worker"], "corruption", about.get("evidence", ""))
        self._log(message.kind, **({"worker": worker} | about))

    def _slowed(self, mark: Mark) -> None:
        """One sign is no proof: every member times the same piece of work, and that decides."""
        if mark.signal == "individual" or mark.worker in self._suspects:
            return
        self._suspects[mark.worker], self._probes = mark.evidence, {}
        for member in self._members():
            member.send(say.Probe(self._rendezvous.current.number))

    def _probed(self, worker: str, seconds: float) -> None:
        self._probes[worker] = seconds
        if not self._suspects or len(self._probes) < self._rendezvous.current.world_size:
            return
        for suspect, evidence in self._suspects.items():
            found = confirm(suspect, self._probes)
            if not found.confirmed:
                self._decide("wait", f"{evidence}; {found.evidence}")
                continue
            peer = self._workers.get(suspect)
            node = peer.hello.node if peer else ""
            self._fault("straggler", suspect, self._rank_of(suspect), node, f"{evidence}; {found.evidence}")
            if self._rendezvous.spares:
                self._rendezvous.bar(suspect)
                self._pause("straggler")
        self._probes = {}

    def _noticed(self, node: str, source: str, deadline_s: float) -> None:
        """A node is about to go: its state is kept, and its workers give their ranks to others."""
        gone = [name for name, one in self._workers.items() if one.hello.node == node]
        if not gone or node in self._kept_out:
            return
        self._kept_out.add(node)
        evidence = f"{source}: {node} goes in {deadline_s:.0f} s"
        self._fault("preemption", gone[0], self._rank_of(gone[0]), node, evidence)
        self._decide("persist", evidence)
        self._persister.request()
        others = [name for name in self._workers if name not in gone]
        if len(others) < self._settings.low:
            return  # nobody could take over: train on until it goes
        for worker in gone:
            self._rendezvous.bar(worker)
        if any(self._rank_of(worker) >= 0 for worker in gone) and self._rendezvous.phase is Phase.RUNNING:
            self._pause("preemption")

    def _keep_out(self, worker: str, fault: str, evidence: str) -> None:
        """A node that fails repeatedly gets no ranks, unless there would be too few without it."""
        peer = self._workers.get(worker)
        node = peer.hello.node if peer else ""
        if not node or not self._on_fault(node, fault, evidence):
            return
        others = [one for one in self._workers.values() if one.hello.node != node]
        if len(others) < self._settings.low:
            return
        self._kept_out.add(node)
        self._decide("quarantine", f"{node}: {evidence}")
        for name, one in self._workers.items():
            if one.hello.node == node:
                self._rendezvous.bar(name)

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

    async def _leave_when_kept(self) -> None:
        self._kept = not await self._persister.settled(timeout_s=15)
        self._conclude(Verdict("killed"))

    async def _keep_then(self, verdict: Verdict) -> None:
        """Put the newest state that is whole into storage, dead workers' too, then stop."""
        shards = newest_whole(await self._look(), self._history, at_most=self._at_most)
        if shards and self._header and shards[0].step > self._persister.kept_step:
            one = shards[0]
            about = {"step": one.step, "world_size": one.world_size, "zero_stage": one.zero_stage}
            self._persister.keep_shards(shards, self._header | about)
            await self._persister.settled(timeout_s=60)
        self._kept = bool(shards) and self._persister.kept_step >= shards[0].step
        self._conclude(verdict)

    def _ask_for_snapshot(self) -> None:
        members = self._rendezvous.current.members
        if self._rendezvous.phase is Phase.RUNNING and members and members[0] in self._workers:
            self._workers[members[0]].send(say.Save(self._rendezvous.current.number))

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
            self._decide("stop", error or "")
        self._log("stopped", reason=verdict.reason, error=error)

    # Keepers.

    async def _look(self) -> list[say.ShardAt]:
        found: list[say.ShardAt] = []
        keepers = list(self._keepers.values())
        asked = [self._ask(keeper, lambda request: say.Look(request), 2.0) for keeper in keepers]
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, say.Held):
                found += answer.shards
        return found

    async def _keepers_of(self, generation: Generation, timeout_s: float) -> None:
        """Wait until the members' nodes have their keepers."""
        until = time.monotonic() + timeout_s
        nodes = {self._workers[m].hello.node for m in generation.members if m in self._workers}
        while nodes - self._keepers.keys() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def persist_on(self, node: str, make: Callable[[int], say.Message], timeout_s: float) -> say.Put:
        """Let the keeper of a node put files into storage.

        Raises:
            TimeoutError: it did not in time.
            LookupError: the node is gone, and what it had with it.
        """
        until = time.monotonic() + 30
        while node in self._nodes and node not in self._keepers and time.monotonic() < until:
            await asyncio.sleep(0.05)
        keeper = self._keepers.get(node)
        if keeper is None:
            raise TimeoutError if node in self._nodes else LookupError(node)
        return await self._ask(keeper, make, timeout_s)

    async def _ask(self, keeper: Peer, make: Callable[[int], say.Message], timeout_s: float) -> Any:
        self._request_number += 1
        number = self._request_number
        future: asyncio.Future[Any] = self._loop.create_future()
        self._requests[number] = future
        keeper.asked.add(future)
        keeper.send(make(number))
        try:
            return await asyncio.wait_for(future, timeout_s)
        finally:
            self._requests.pop(number, None)
            keeper.asked.discard(future)

    def _pair_keepers(self) -> None:
        """Every node's snapshots go to the next node's keeper, in a ring: never to its own."""
        nodes = sorted(self._keepers)
        for index, node in enumerate(nodes):
            buddy = nodes[(index + 1) % len(nodes)]
            self._keepers[node].send(say.Mirror(self._keepers[buddy].hello.address if buddy != node else ""))

    # Small things.

    def _members(self) -> list[Peer]:
        return [self._workers[m] for m in self._rendezvous.current.members if m in self._workers]

    def _rank_of(self, worker: str) -> int:
        members = self._rendezvous.current.members
        return members.index(worker) if worker in members else -1

    def _log(self, kind: str, **about: Any) -> None:
        self._ledger.write(kind, **about)

    def _decide(self, action: str, reason: str) -> None:
        limit = self._settings.max_failures
        self._log("decision", action=action, reason=reason, budget_left=None if limit < 0 else limit - self._faults)

    def _spawn(self, work: Coroutine[Any, Any, Any] | Awaitable[Any]) -> None:
        task = self._loop.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            self._conclude(
                Verdict("failed", {"type": "TigerError", "what": f"the hub failed: {error!r}", "where": "", "fix": ""})
            )
