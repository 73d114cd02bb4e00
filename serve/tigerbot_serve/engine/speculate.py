"""Speculative mode: one member drafts a few tokens, the other reads them in one pass, the mixture decides.

The member that the dial favours drafts, drawing from its own distribution q. One pass of the other gives its states at
every drafted place, and so the mixture r there, w and heads and temperature and masks included. A drafted token x stays
with probability min(1, r(x) / q(x)); the first that does not is replaced by a draw from what r has more than q, and the
rest is dropped (Leviathan et al., 2211.17192; for mixtures 2502.01662). What is given is distributed exactly as r,
whatever q is. Keys and values need no undoing: a place is written again before it is seen.

Where all of a draft stayed the verifier has read the last token already. The drafter's next state then completes the
pair, so the next token is drawn from the mixture itself: the bonus token, with no chance of refusal.

A drafted token takes three draws of the request's generator, a bonus token one, so a seed's text is another than in
plain mode and the same within this one.

Legend: k drafted tokens of a sequence, R rows, V vocabulary, d hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tigerbot.spec import SpeculateSpec
from tigerbot.surprise import linger
from tigerbot_serve.engine.choose import choose, record, tops
from tigerbot_serve.engine.distribution import probabilities, steered
from tigerbot_serve.engine.half import first_side, given_temperatures, read_head, weight
from tigerbot_serve.engine.request import TokenEvent
from tigerbot_serve.engine.rows import Rows, plan_of
from tigerbot_serve.engine.sampler import draw
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.ensemble.dial import temperature
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, NOTHING, Feed
from tigerbot_serve.ensemble.mixture import Mixture, Plan

SIDES = (CREATIVE, FACTUAL)
Taken = list[tuple[Sequence, TokenEvent]]


def settle(
    own_RV: Tensor, target_RV: Tensor, drafted_R: Tensor, accept_R: Tensor, again_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The token of every place, if it is reached, and whether it is the drafted one.

    Args:
        own_RV: probabilities that `drafted` was really drawn from.
        target_RV: probabilities that the result is to be distributed by.
        accept_R, again_R: uniform draws, for the decision and for the replacement.
    """
    ids_R1 = drafted_R[:, None]
    kept_R = accept_R * own_RV.gather(1, ids_R1)[:, 0] < target_RV.gather(1, ids_R1)[:, 0]
    more_RV = (target_RV - own_RV).clamp(min=0)
    # Where rounding leaves nothing, both are the same distribution.
    more_RV = torch.where(more_RV.sum(dim=-1, keepdim=True) > 0, more_RV, target_RV)
    return torch.where(kept_R, drafted_R, draw(more_RV, again_R)), kept_R


@dataclass
class _Draft:
    """One sequence's cycle: what was drafted, from which states and distributions."""

    sequence: Sequence
    side: int
    limit: int
    surprise: float
    ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    waits: bool = True

    @property
    def wants(self) -> bool:
        return self.waits and len(self.ids) < self.limit

    def next_feed(self) -> tuple[int, int]:
        """The token that the drafter reads next, and its position."""
        return (self.ids or self.sequence.output_ids)[-1], self.sequence.fed + len(self.ids)


class Speculation:
    """Cycles of draft and verification over one mixture."""

    def __init__(self, mixture: Mixture, spec: SpeculateSpec) -> None:
        self._mixture, self._members, self._spec = mixture, mixture.members, spec
        self.drafted = self.kept = 0

    def applies(self, sequences: list[Sequence]) -> bool:
        """Few sequences, each of both members and not steered by what was said before."""
        return 0 < len(sequences) <= self._spec.max_sequences and all(
            0 < one.dial < 1 and not steered(one) and not one.debt for one in sequences
        )

    def cycle(self, rows: Rows) -> Taken:
        """The next tokens of every sequence, at least one each."""
        taken: Taken = []
        drafts = [self._begin(sequence) for sequence in rows.sequences]
        for _ in range(self._spec.tokens):
            active = [draft for draft in drafts if draft.wants]
            if not active:
                break
            taken += self._draft(rows, active)
        drafts = [draft for draft in drafts if draft.ids]
        if drafts:
            for draft, states_Td in zip(drafts, self._read(rows, drafts), strict=True):
                taken += [(draft.sequence, event) for event in self._verify(draft, states_Td)]
        return taken

    def _begin(self, sequence: Sequence) -> _Draft:
        left = sequence.max_tokens - len(sequence.output_ids)
        return _Draft(sequence, first_side(sequence), min(self._spec.tokens, left), sequence.surprise)

    def _draft(self, rows: Rows, active: list[_Draft]) -> Taken:
        """One token of every draft that is not full; a bonus token, where there is one, is taken at once."""
        by_side = [[draft for draft in active if draft.side == side] for side in SIDES]
        feeds = [
            _feed(rows, side, by_side[side], [[draft.next_feed()[0]] for draft in by_side[side]]) for side in SIDES
        ]
        hidden = self._members.forward(rows.caches, (feeds[CREATIVE], feeds[FACTUAL]))
        taken: Taken = []
        for side in SIDES:
            states_RTd = hidden[side]
            if states_RTd is None:
                continue
            fresh = []
            for draft, state_d in zip(by_side[side], states_RTd[:, -1], strict=True):
                theirs = draft.sequence.read_ahead()
                if theirs is not None and not draft.ids:
                    taken += self._bonus(draft, state_d, theirs)
                else:
                    fresh.append((draft, state_d))
            if fresh:
                self._draw(side, [draft for draft, _ in fresh], torch.stack([state for _, state in fresh]))
        return taken

    def _bonus(self, draft: _Draft, own_d: Tensor, theirs_d: Tensor) -> Taken:
        sequence = draft.sequence
        creative, factual = (own_d, theirs_d) if draft.side == CREATIVE else (theirs_d, own_d)
        plan = plan_of([sequence], ([0], [0]), self._members.device)
        event = choose(self._mixture, [sequence], plan, creative[None], factual[None])[0]
        draft.surprise = sequence.surprise
        draft.limit -= 1
        draft.waits = sequence.finish_reason is None
        return [(sequence, event)]

    def _draw(self, side: int, drafts: list[_Draft], states_Rd: Tensor) -> None:
        """Draw from the drafter's own distribution, with the temperature and masks that the mixture would have."""
        mixture, spec, device = self._mixture, self._mixture.spec, states_Rd.device
        sequences = [draft.sequence for draft in drafts]
        own_RV = self._members.log_probabilities(side, states_Rd)
        p_R = read_head(mixture, side, states_Rd, [draft.surprise for draft in drafts])
        dial_R = torch.tensor([one.dial for one in sequences], device=device)
        w_R = weight(mixture, side, dial_R, p_R, 0.5)
        heat_R = temperature(w_R, given_temperatures(sequences, device), spec)
        q_RV = probabilities(own_RV, heat_R, sequences, spec.plausibility)
        draws = [one.rng.random() for one in sequences]
        ids_R = draw(q_RV, torch.tensor(draws, dtype=torch.float64, device=device))
        chosen = own_RV.gather(1, ids_R[:, None])[:, 0].tolist()
        for row, (draft, token, logprob) in enumerate(zip(drafts, ids_R.tolist(), chosen, strict=True)):
            draft.ids.append(token)
            draft.states.append(states_Rd[row])
            draft.own.append(q_RV[row])
            if side == FACTUAL:
                draft.surprise = linger(draft.surprise, -logprob)

    def _read(self, rows: Rows, drafts: list[_Draft]) -> list[Tensor]:
        """The other member's states (k + 1, d) over the last token and the draft."""
        by_side = [[draft for draft in drafts if draft.side != side] for side in SIDES]
        width = 1 + max(len(draft.ids) for draft in drafts)
        feeds = [
            _feed(
                rows,
                side,
                by_side[side],
                [[draft.sequence.output_ids[-1], *draft.ids] for draft in by_side[side]],
                width,
            )
            for side in SIDES
        ]
        hidden = self._members.forward(rows.caches, (feeds[CREATIVE], feeds[FACTUAL]))
        found: dict[int, Tensor] = {}
        for side in SIDES:
            states_RTd = hidden[side]
            if states_RTd is not None:
                found |= {id(draft): states_RTd[row] for row, draft in enumerate(by_side[side])}
        return [found[id(draft)][: len(draft.ids) + 1] for draft in drafts]

    def _verify(self, draft: _Draft, theirs_Td: Tensor) -> list[TokenEvent]:
        """Take drafted tokens up to the first that the mixture refuses, and its replacement."""
        sequence, count, device = draft.sequence, len(draft.ids), theirs_Td.device
        own_kd, theirs_kd = torch.stack(draft.states), theirs_Td[:count]
        creative_kd, factual_kd = (own_kd, theirs_kd) if draft.side == CREATIVE else (theirs_kd, own_kd)
        drafted_k = torch.tensor(draft.ids, device=device)
        plan = Plan(
            [sequence.dial] * count,
            [sequence.temperature] * count,
            [sequence.request.top_p] * count,
            (list(range(count)), list(range(count))),
            self._members.device,
        )
        surprise_k = torch.tensor(self._surprises(sequence, factual_kd, drafted_k), device=device)
        mixed = self._mixture.next(creative_kd, factual_kd, surprise_k, plan)
        target_kV = probabilities(
            mixed.logprobs_RV, mixed.temperature_R, [sequence] * count, self._mixture.spec.plausibility
        )
        draws = [(sequence.rng.random(), sequence.rng.random()) for _ in range(count)]
        accept_k, again_k = torch.tensor(draws, dtype=torch.float64, device=device).T
        ids_k, kept_k = settle(torch.stack(draft.own), target_kV, drafted_k, accept_k, again_k)
        chosen_k, expected_k = mixed.logprobs_RV.gather(1, ids_k[:, None])[:, 0], mixed.expected(ids_k)
        numbers = torch.stack([chosen_k, expected_k, mixed.p_div_R, mixed.p_dev_R, mixed.w_R], dim=1).tolist()
        alternatives = tops(mixed.logprobs_RV, [sequence] * count)
        kept = kept_k.tolist()
        reached = kept.index(False) + 1 if False in kept else count
        events: list[TokenEvent] = []
        for place, token in enumerate(ids_k.tolist()[:reached]):
            events += record([sequence], [token], [alternatives[place]], [numbers[place]])
            if sequence.finish_reason is not None:
                break
        else:
            if all(kept):
                sequence.keep_ahead(theirs_Td[count])
        self.drafted += count
        self.kept += sum(kept[: len(events)])
        return events

    def _surprises(self, sequence: Sequence, factual_kd: Tensor, drafted_k: Tensor) -> list[float]:
        """The lingering surprise at every place, as plain decoding would have it."""
        if self._mixture.heads is None:
            return [0.0] * len(drafted_k)
        logprobs_kV = self._members.log_probabilities(FACTUAL, factual_kd)
        found = [sequence.surprise]
        for logprob in logprobs_kV.gather(1, drafted_k[:, None])[:-1, 0].tolist():
            found.append(linger(found[-1], -logprob))
        return found


def _feed(rows: Rows, side: int, drafts: list[_Draft], tokens: list[list[int]], width: int = 1) -> Feed:
    if not drafts:
        return NOTHING
    starts = [draft.sequence.fed if width > 1 else draft.next_feed()[1] for draft in drafts]
    return rows.pick(side, [draft.sequence for draft in drafts], tokens, starts, width)
