"""Who gets no rank any more: workers that were told to end, nodes about to go, nodes that fail repeatedly.

Nobody is kept out where too few would be left: a doubtful node trains better than none. What put somebody here is
written down by whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable

from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.members import Members

OnFault = Callable[[str, str, str], bool]  # (node, kind, evidence): whether the node is to be kept out from now on


class Outcasts:
    """Of one run.

    Args:
        low: workers that must be left.
        on_fault: hears of every fault that has a node, and knows its history.
    """

    def __init__(self, members: Members, books: Books, low: int, on_fault: OnFault) -> None:
        self._members, self._books, self._low, self._on_fault = members, books, low, on_fault
        self._nodes: set[str] = set()

    def is_out(self, node: str) -> bool:
        return node in self._nodes

    def judge(self, worker: str, fault: str, evidence: str) -> None:
        """A node that fails repeatedly gets no ranks, unless there would be too few without it."""
        node = self._members.peers.node_of(worker)
        if node and self._on_fault(node, fault, evidence) and self.bar_node(node):
            self._books.decide("quarantine", f"{node}: {evidence}")

    def bar_node(self, node: str) -> bool:
        """Give this node's workers no rank any more; not where too few would be left: it is used until it goes."""
        if not self.bar(self._members.peers.on(node)):
            return False
        self._nodes.add(node)
        return True

    def bar(self, workers: list[str]) -> bool:
        rendezvous = self._members.rendezvous
        left = [one for one in self._members.peers.workers if one not in workers and not rendezvous.is_barred(one)]
        if len(left) < self._low:
            return False
        for worker in workers:
            rendezvous.bar(worker)
        return True
