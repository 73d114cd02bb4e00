"""The hub: in the driver, one TCP server that every worker and keeper holds a line to.

A process that dies closes its socket, and the hub knows within a millisecond; one that is stuck goes quiet, and the
watch names it. Then the hub calls the generation off, waits until every living member is out, finds the newest whole
state, and forms the next generation from the survivors and the spares. It is the only one that decides, and every
decision goes to the ledger. It knows nothing about Ray, models or storage: those are the callables it is given.

Here are its thread, its door to the driver, and who hears which message. Lines are `peers.py`'s, who holds which rank
`rendezvous.py`'s, how a generation begins and ends `generations.py`'s, what a fault does `faults.py`'s, who is kept out
`outcasts.py`'s, budgets `books.py`'s, and how the run ends `ending.py`'s.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from tigerbot_jobs.train.ledger import Ledger
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.ending import Ending, Verdict
from tigerbot_jobs.train.recovery.faults import Faults
from tigerbot_jobs.train.recovery.generations import Generations
from tigerbot_jobs.train.recovery.inventory import Restored
from tigerbot_jobs.train.recovery.members import Members
from tigerbot_jobs.train.recovery.outcasts import OnFault, Outcasts
from tigerbot_jobs.train.recovery.past import Past
from tigerbot_jobs.train.recovery.peers import Peer, Peers
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.rendezvous import Phase, Rendezvous
from tigerbot_jobs.train.recovery.settings import HubSettings
from tigerbot_jobs.train.recovery.suspects import Suspects
from tigerbot_jobs.train.watch.beats import Beat
from tigerbot_jobs.train.watch.hangs import HangWatch

_TICK_S = 0.05
_CHECK_S = 0.25  # the watch looks at every member


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
        on_fault: OnFault = lambda node, kind, evidence: False,
        on_event: Callable[[str, str], None] = lambda event, detail: None,
        generation: int = 0,
        history: list[Restored] | None = None,
    ) -> None:
        self._persister, self._on_row, self._on_node = persister, on_row, on_node
        self._peers = Peers(settings.token, self)
        self._books = books = Books(ledger, settings.max_failures, on_event)
        self._rendezvous = Rendezvous(settings.low, settings.high, generation)
        self._watch = HangWatch(floor_s=settings.hang_floor_s, silence_s=settings.silence_s)
        self._suspects, spawn = Suspects(), self._spawn
        self._past = past = Past(history or [])
        self._members = members = Members(self._peers, self._rendezvous, books, self._watch, spawn)
        self._outcasts = Outcasts(members, books, settings.low, on_fault)
        self._ending = ending = Ending(books, persister, past, self._peers, spawn)
        self._generations = Generations(
            settings, members, books, persister, past, ending, self._watch, self._suspects, spawn
        )
        self._faults = Faults(
            members, books, persister, past, self._outcasts, self._generations, ending, spawn, settings.silence_s
        )
        self._checked_at = 0.0
        self._finished, self._started = threading.Event(), threading.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="hub")
        self._host = self._address = ""
        persister.persist_on, persister.ask_for_snapshot = self._peers.ask_node, self._ask_for_snapshot
        persister.log = books.log

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
        return self._ending.verdict

    def node_going(self, ray_node: str, source: str, deadline_s: float) -> None:
        """Ray, or whoever knows, says that a node will go."""
        names = {one.hello.node for one in self._peers.workers.copy().values() if one.hello.ray_node == ray_node}
        for node in names:
            self._loop.call_soon_threadsafe(self._faults.node_goes, node, source, deadline_s)

    def leave(self) -> None:
        """Snapshot, persist, then stop: the run is to go on another time."""
        self._loop.call_soon_threadsafe(self._leave)

    def drop(self) -> None:
        """Stop, and keep nothing: the run will not go on."""
        self._loop.call_soon_threadsafe(self._ending.drop)

    def close(self) -> None:
        """Stop everybody, and the hub."""
        self._loop.call_soon_threadsafe(self._ending.conclude, Verdict("killed"))
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
            while (verdict := self._ending.verdict) is None:
                await asyncio.sleep(_TICK_S)
                self._tick()
            await self._peers.stop(say.KEPT if self._ending.kept else verdict.reason)
            self._finished.set()
            await asyncio.sleep(0.2)  # the stops are on their way
        self._peers.close()
        for task in self._tasks:
            task.cancel()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(others, timeout=1) if others else None
        await self._loop.shutdown_default_executor()  # a commit under way ends before anybody goes on with the run

    def _tick(self) -> None:
        now = time.monotonic()
        if self._generations.is_told and now - self._checked_at >= _CHECK_S:
            self._checked_at = now
            self._look_around()
        self._generations.tick(now)

    def _look_around(self) -> None:
        """Who hangs, and who is slow."""
        for hang in self._watch.check():
            self._faults.hung(hang)
        if self._suspects.check():
            self._members.tell(say.Probe(self._rendezvous.current.number))

    # What the lines say.

    def worker_joined(self, peer: Peer) -> None:
        hello = peer.hello
        if self._outcasts.is_out(hello.node):
            self._rendezvous.bar(hello.worker)
        self._books.log("worker_joined", worker=hello.worker, host=hello.host, node=hello.node, pid=hello.pid)
        if self._ending.verdict is not None:
            peer.send(say.Stop(self._ending.verdict.reason))

    def worker_left(self, peer: Peer) -> None:
        self._watch.forget(peer.hello.worker)
        if self._ending.verdict is None:
            self._faults.died(peer.hello)

    def keeper_left(self, node: str) -> None:
        self._watch.keeper_gone(node)

    def wants_keeper(self, hello: say.Hello) -> None:
        if self._ending.verdict is None:
            self._on_node(hello)

    def took(self, peer: Peer, message: say.Message) -> None:
        worker, hello = peer.hello.worker, peer.hello
        match message:
            case say.Pulse():
                self._pulse(peer, message)
            case say.Ready():
                self._books.log("worker_ready", worker=worker, host=hello.host, node=hello.node, pid=hello.pid)
                self._rendezvous.ready(worker)
                self._generations.gather()
            case say.Out():
                self._member_out(peer, message)
            case say.Say():
                self._faults.said(worker, message)
            case say.Copied():
                self._books.log("copied", node=hello.node, file=message.file, peer=message.peer, step=message.step)
            case say.Noticed() if hello.role == "worker":
                self._faults.worker_goes(hello, message)
            case say.Noticed():
                self._faults.node_goes(hello.node, message.source, message.deadline_s)
            case say.Meet() | say.Formed() | say.Restored() | say.Saved() | say.Probed():
                if self._rendezvous.is_member(worker, message.generation):  # the fence
                    self._member_said(peer, message)

    def _member_said(self, peer: Peer, message: say.Message) -> None:
        worker = peer.hello.worker
        match message:
            case say.Meet():
                self._members.tell(message, but=peer)
            case say.Formed() if self._members.rank_of(worker) == 0:
                self._books.log("group_formed", generation=message.generation, seconds=message.seconds)
            case say.Restored():
                self._generations.restored(worker, message)
            case say.Saved():
                self._ending.saved(message.header)
                self._persister.saved(peer.hello.node, self._members.rank_of(worker), message)
            case say.Probed():
                for found in self._suspects.probed(worker, message.seconds):
                    self._faults.suspected(found)

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

    def _member_out(self, peer: Peer, message: say.Out) -> None:
        """A member has left its generation; one that never had any may only say that it cannot have one."""
        worker = peer.hello.worker
        is_member = self._rendezvous.is_member(worker, message.generation)
        if message.error is not None and (message.generation == 0 or is_member):
            self._ending.fail(message.error)
            return
        if not is_member:
            return
        self._rendezvous.out(worker)
        if message.why == "done":
            self._generations.done(worker)
            return
        self._past.guard = message.guard or self._past.guard
        if self._rendezvous.phase is Phase.RUNNING:
            self._rendezvous.end()
            self._faults.first_out(peer, message)
        self._generations.gather()

    # Small things.

    def _leave(self) -> None:
        running = self._rendezvous.phase is Phase.RUNNING
        self._ending.leave(training=running and self._generations.is_restored)

    def _ask_for_snapshot(self) -> None:
        members = self._rendezvous.current.members
        if self._rendezvous.phase is Phase.RUNNING and members and members[0] in self._peers.workers:
            self._peers.workers[members[0]].send(say.Save(self._rendezvous.current.number))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._ending.fail_now(f"the hub failed: {task.exception()!r}")
