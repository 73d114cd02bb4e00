"""Which decoding sequence sits in which cache row of which side, and the inputs of the next step.

A side's rows are numbered from the middle of the cache outwards without holes: a sequence that leaves is replaced by
its side's outermost row.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from tigerbot_serve.engine.prefix import PrefixCache
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, Caches, Feed, Members
from tigerbot_serve.ensemble.mixture import Plan


class Rows:
    """The decoding sequences of up to `slots` slots, in one cache."""

    def __init__(self, members: Members, slots: int, max_length: int) -> None:
        self._members = members
        self._caches = members.caches(slots, max_length)
        self._sides: tuple[list[Sequence], list[Sequence]] = ([], [])
        self.sequences: list[Sequence] = []
        self._plan: Plan | None = None

    @property
    def caches(self) -> Caches:
        return self._caches

    def add(self, sequence: Sequence, scratch: Caches) -> None:
        """Take a prefilled sequence's row over from `scratch`, where it is the only one."""
        for side in self._members.sides(sequence.dial):
            self._caches.copy(scratch, side, 0, len(self._sides[side]), len(sequence.prompt_ids))
            self._sides[side].append(sequence)
        self.sequences.append(sequence)
        self._plan = None

    def remove(self, sequence: Sequence) -> bool:
        """Free the sequence's rows; false when it has none."""
        if sequence not in self.sequences:
            return False
        self.sequences.remove(sequence)
        for side, members in enumerate(self._sides):
            if sequence not in members:
                continue
            hole, last = members.index(sequence), members.pop()
            if last is not sequence:
                # One more than is fed: who verified a draft may have read the last token already.
                self._caches.copy(self._caches, side, len(members), hole, last.fed + 1)
                members[hole] = last
        self._plan = None
        return True

    def keep(self, sequence: Sequence, prefix: PrefixCache) -> None:
        """Leave what the sequence has fed to later prompts: the next turn of a chat begins with it."""
        ids = (*sequence.prompt_ids, *sequence.output_ids)[: sequence.fed - sequence.debt]
        for side, members in enumerate(self._sides):
            if sequence in members:
                prefix.store(side, sequence.request.tenant, ids, self._caches, members.index(sequence))

    def clear(self) -> None:
        for members in (*self._sides, self.sequences):
            members.clear()
        self._plan = None

    def feeds(self) -> tuple[Feed, Feed]:
        """Every sequence's last token, at the position after what is cached."""
        creative = self._sides[CREATIVE][::-1]  # the outermost row is the first of the view
        factual = self._sides[FACTUAL]
        return _feed(creative), _feed(factual)

    def pick(
        self,
        side: int,
        sequences: Many[Sequence],
        tokens: Many[Many[int]] | None = None,
        starts: Many[int] | None = None,
        width: int = 1,
    ) -> Feed:
        """Tokens for some sequences' rows of a side, filled up to `width`; by default each one's last."""
        index = {id(one): place for place, one in enumerate(self._sides[side])}
        tokens = [one.output_ids[-1:] for one in sequences] if tokens is None else tokens
        starts = [one.fed for one in sequences] if starts is None else starts
        filled = [[*row, *[0] * (width - len(row))] for row in tokens]
        return Feed(filled, starts, rows=[index[id(one)] for one in sequences])

    def places(self) -> tuple[dict[int, int], dict[int, int]]:
        """Where in the states of `feeds` each sequence's row is, by side and by the sequence's id."""
        creative, factual = self._sides[CREATIVE][::-1], self._sides[FACTUAL]
        return {id(one): i for i, one in enumerate(creative)}, {id(one): i for i, one in enumerate(factual)}

    def plan(self) -> Plan:
        """The plan of the sequences as they are now, made again only when one came or went."""
        if self._plan is None:
            rows = tuple([side.get(id(one)) for one in self.sequences] for side in self.places())
            self._plan = plan_of(self.sequences, (rows[0], rows[1]), self._members.device)
        return self._plan


def plan_of(sequences: list[Sequence], rows: tuple[list[int | None], list[int | None]], device: str = "cpu") -> Plan:
    """The plan of sequences whose states stand in the given rows."""
    return Plan(
        [one.dial for one in sequences],
        [one.temperature for one in sequences],
        [one.request.top_p for one in sequences],
        rows,
        device,
    )


def _feed(sequences: list[Sequence]) -> Feed:
    return Feed([one.output_ids[-1:] for one in sequences], [one.fed for one in sequences], list(map(id, sequences)))
