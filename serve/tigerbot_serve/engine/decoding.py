"""A step of everything that decodes: which members run for which sequences, and in which mode.

Plainly all rows take one token in one forward of each member. With a gate the first member of some sequences runs
before it is known whether the second one has to. Few sequences may decode speculatively, several tokens a step. This
module knows nothing about tickets or prompts.

Legend: R rows of a forward, T tokens fed a row, d hidden width.
"""

from __future__ import annotations

from torch import Tensor

from tigerbot.spec import EngineSpec
from tigerbot_serve.engine.choose import choose
from tigerbot_serve.engine.gate import Ahead, Gate
from tigerbot_serve.engine.half import first_side
from tigerbot_serve.engine.rows import Rows, plan_of
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.speculate import SIDES, Speculation, Taken
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL
from tigerbot_serve.ensemble.mixture import Mixture, Plan


class Decoding:
    """The modes that a spec switches on, over one mixture."""

    def __init__(self, mixture: Mixture, spec: EngineSpec) -> None:
        self._mixture, self._members = mixture, mixture.members
        pair = not mixture.members.alone
        self.gate = Gate(mixture, spec.gate) if spec.gate and pair else None
        self.speculation = Speculation(mixture, spec.speculate) if spec.speculate and pair else None

    @staticmethod
    def slack(spec: EngineSpec) -> int:
        """Cache positions beyond a sequence's own that a step may write: rows of one forward are filled up alike."""
        debt = spec.gate.max_debt if spec.gate else 0
        return max(debt, spec.speculate.tokens if spec.speculate else 0) + 1

    def step(self, rows: Rows) -> Taken:
        """The next token of every sequence, or tokens."""
        if self.speculation is not None and self.speculation.applies(rows.sequences):
            return self.speculation.cycle(rows)
        if self.gate is not None:
            looked = [sequence for sequence in rows.sequences if self.gate.looks(sequence)]
            if any(map(self.gate.skipping, looked)):
                return self._gated(rows, looked, self.gate)
            if looked:
                return self._watched(rows, looked, self.gate)
        creative, factual = self._members.forward(rows.caches, rows.feeds())
        events = choose(self._mixture, rows.sequences, rows.plan(), last(creative), last(factual))
        return list(zip(rows.sequences, events, strict=True))

    def _watched(self, rows: Rows, looked: list[Sequence], gate: Gate) -> Taken:
        """Nobody skips yet: both members run for all as they do plainly, and the gate looks at the first one's states."""
        states = [last(hidden) for hidden in self._members.forward(rows.caches, rows.feeds())]
        places = rows.places()

        def of(side: int, sequences: list[Sequence]) -> Tensor | None:
            state_Rd = states[side]
            mine = [places[side][id(one)] for one in sequences]
            return state_Rd[mine] if mine and state_Rd is not None else None

        taken: Taken = []
        plain = [sequence for sequence in rows.sequences if sequence not in looked]
        if plain:
            whole = self._whole(plain)
            plan = self._plan(plain, whole)
            events = choose(self._mixture, plain, plan, of(CREATIVE, whole[CREATIVE]), of(FACTUAL, whole[FACTUAL]))
            taken += zip(plain, events, strict=True)
        for side in SIDES:
            mine = [sequence for sequence in looked if first_side(sequence) == side]
            own_Rd, other_Rd = of(side, mine), of(1 - side, mine)
            if own_Rd is None or other_Rd is None:
                continue
            own_RV, theirs_RV = self._members.log_probabilities_of_both(side, own_Rd, other_Rd)
            ahead = gate.look(side, mine, own_Rd, own_RV)
            gate.skips(ahead)  # nobody does; what was seen counts for the next token
            events = gate.together(ahead, list(range(len(mine))), other_Rd[:, None], theirs_RV)
            taken += zip(mine, events, strict=True)
        return taken

    def _gated(self, rows: Rows, looked: list[Sequence], gate: Gate) -> Taken:
        """First members of who is looked at run beside both members of the others; second ones where they must."""
        plain = [sequence for sequence in rows.sequences if sequence not in looked]
        first = [[sequence for sequence in looked if first_side(sequence) == side] for side in SIDES]
        whole = self._whole(plain)
        fed = [rows.pick(side, [*whole[side], *first[side]]) for side in SIDES]
        states = [last(hidden) for hidden in self._members.forward(rows.caches, (fed[CREATIVE], fed[FACTUAL]))]
        taken: Taken = []
        if plain:
            plan = self._plan(plain, whole)
            mine = [_part(states[side], 0, len(whole[side])) for side in SIDES]
            taken += zip(plain, choose(self._mixture, plain, plan, *mine), strict=True)
        aheads = []
        for side in SIDES:
            state = _part(states[side], len(whole[side]), len(whole[side]) + len(first[side]))
            if state is not None:
                aheads.append(gate.look(side, first[side], state))
        return taken + self._second_members(rows, aheads, gate)

    def _whole(self, plain: list[Sequence]) -> list[list[Sequence]]:
        """Of sequences that are stepped plainly, those that need each side."""
        return [[one for one in plain if side in self._members.sides(one.dial)] for side in SIDES]

    def _plan(self, plain: list[Sequence], whole: list[list[Sequence]]) -> Plan:
        """Their plan, where the states of a side are those of its sequences, in this order."""
        places = [{id(one): index for index, one in enumerate(side)} for side in whole]
        rows = [[side.get(id(one)) for one in plain] for side in places]
        return plan_of(plain, (rows[CREATIVE], rows[FACTUAL]), self._members.device)

    def _second_members(self, rows: Rows, aheads: list[Ahead], gate: Gate) -> Taken:
        skips = {ahead.side: gate.skips(ahead) for ahead in aheads}
        asking: list[list[Sequence]] = [[], []]
        for ahead in aheads:
            pairs = zip(ahead.sequences, skips[ahead.side], strict=True)
            asking[1 - ahead.side] = [sequence for sequence, skip in pairs if not skip]
        states: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(asking):
            width = 1 + max(sequence.debt for side in SIDES for sequence in asking[side])
            fed = [
                rows.pick(
                    side,
                    asking[side],
                    [one.output_ids[-(one.debt + 1) :] for one in asking[side]],
                    [one.fed - one.debt for one in asking[side]],
                    width,
                )
                for side in SIDES
            ]
            states = self._members.forward(rows.caches, (fed[CREATIVE], fed[FACTUAL]))
        taken: Taken = []
        for ahead in aheads:
            both = [row for row, skip in enumerate(skips[ahead.side]) if not skip]
            one = [row for row, skip in enumerate(skips[ahead.side]) if skip]
            others = states[1 - ahead.side]
            if others is not None:
                events = gate.together(ahead, both, others)
                taken += zip([ahead.sequences[row] for row in both], events, strict=True)
            if one:
                taken += zip([ahead.sequences[row] for row in one], gate.alone(ahead, one), strict=True)
        return taken


def last(hidden_RTd: Tensor | None) -> Tensor | None:
    return None if hidden_RTd is None else hidden_RTd[:, -1]


def _part(state_Rd: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if state_Rd is None or start == stop else state_Rd[start:stop]
