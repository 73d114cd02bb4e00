"""The gate: leave out the second member's pass for a token where it cannot matter, or hardly.

The member with the larger share of the dial always runs. From its state alone the gate decides; what the other one was
not fed is its debt, paid in one chunk when it is asked again (after `max_debt` tokens at the latest).

With `mix: linear` this is exact: `certain` bounds the mixture from below, a draw inside the bound needs no second
member, one outside it does. With `mix: geometric` nothing is certain, for the other member may forbid any token; there
the gate measures. Wherever both ran it knows the total variation between what it would have drawn from and the
mixture, by how sure the first member was and how much weight the other has, and it skips where the upper end of that
mean is below `eps`; every 16th such token both run all the same, so the measure stays true. A text then also depends
on what was measured before it.

Skipping starts when the expected run is `min_run` tokens and ends when it is below half of it: a member that is asked
again at every other token costs more than it saves. While there is no hope of it, every fourth token is a probe. Two
adapters of one base are one batch, so that the second costs little beside the first and much by itself: there the run
must be longer, every eighth token is a probe, and as long as nobody skips both run together as they do without a gate.

Legend: R rows (sequences) of a group with the same first member, K new tokens of a row that pays its debt, d hidden
width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tigerbot.spec import GateSpec
from tigerbot.surprise import linger
from tigerbot_serve.engine.certain import certain, coupled, decided
from tigerbot_serve.engine.choose import record
from tigerbot_serve.engine.distribution import probabilities, steered
from tigerbot_serve.engine.half import given_temperatures, read_head, weight
from tigerbot_serve.engine.request import TokenEvent
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.ensemble.dial import creative_weight, mix, temperature
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL
from tigerbot_serve.ensemble.mixture import Mixture

_MEMORY = 0.7  # of the running mean that `trust` is
_PROBE, _HOPE = 4, 0.2
_RARE_PROBE = 8
_MIN_RUN, _MIN_RUN_OF_ONE_BATCH = 3, 12
_AUDIT = 16
_SEEN = 64  # measured tokens before a place of the meter is believed
_KEPT = 1024  # after so many the older ones count half


@dataclass
class Ahead:
    """What the first member alone says about its sequences' next tokens.

    Attributes:
        own_RV: its log-probabilities.
        p_R: its head's reading, None without heads.
        certain_RV: what may be drawn without the other; its sum is the chance of that.
        alone_RV: what would be drawn from without the other; None where the mix is linear.
        places: where the meter keeps what it measures about each.
    """

    side: int
    sequences: list[Sequence]
    own_RV: Tensor
    p_R: Tensor | None
    certain_RV: Tensor
    alone_RV: Tensor | None
    places: list[tuple[int, int]]
    uniform_R: Tensor


class Gate:
    """Decides for sequences of one mixture. Its state is what it has measured."""

    def __init__(self, mixture: Mixture, spec: GateSpec) -> None:
        self._mixture, self._spec = mixture, spec
        self._linear = mixture.spec.mix == "linear"
        self._one_batch = mixture.members.one_batch
        self._min_run = spec.min_run or (_MIN_RUN_OF_ONE_BATCH if self._one_batch else _MIN_RUN)
        self.meter = Meter(spec.eps)

    def may(self, sequence: Sequence) -> bool:
        """Whether the gate ever applies: two members, and nothing asked for that only the mixture can give."""
        request = sequence.request
        if self._mixture.members.alone or not 0 < sequence.dial < 1 or steered(sequence):
            return False
        cut = request.top_p < 1 or request.top_k or request.min_p
        return request.logprobs is None and not (self._linear and cut)

    def looks(self, sequence: Sequence) -> bool:
        """Whether the first member's state is looked at by itself, at this token."""
        if not self.may(sequence):
            return False
        if self.skipping(sequence):
            return True
        if self._one_batch:
            return len(sequence.output_ids) % _RARE_PROBE == 1
        return sequence.trust > _HOPE or len(sequence.output_ids) % _PROBE == 1

    @staticmethod
    def skipping(sequence: Sequence) -> bool:
        """Whether the other member may be skipped at this token, or owes tokens that were."""
        return sequence.skipping or sequence.debt > 0

    def look(self, side: int, sequences: list[Sequence], hidden_Rd: Tensor, own_RV: Tensor | None = None) -> Ahead:
        """Read the first member's states, and its log-probabilities where they are known; draws once a token."""
        mixture, spec, device = self._mixture, self._mixture.spec, hidden_Rd.device
        if own_RV is None:
            own_RV = mixture.members.log_probabilities(side, hidden_Rd)
        p_R = read_head(self._mixture, side, hidden_Rd, [sequence.surprise for sequence in sequences])
        dial_R = torch.tensor([sequence.dial for sequence in sequences], device=device)
        given_R = given_temperatures(sequences, device)
        low_R, middle_R, high_R = (weight(mixture, side, dial_R, p_R, other) for other in (0.0, 0.5, 1.0))
        low_R, high_R = torch.minimum(low_R, high_R), torch.maximum(low_R, high_R)
        cool_R, hot_R = (temperature(w_R, given_R, spec) for w_R in (low_R, high_R))
        draws = [sequence.rng.random() for sequence in sequences]
        uniform_R = torch.tensor(draws, dtype=torch.float64, device=device)
        if self._linear:
            other_R = 1 - low_R if side == CREATIVE else high_R
            cool_R, hot_R = torch.minimum(cool_R, hot_R), torch.maximum(cool_R, hot_R)
            certain_RV = certain(own_RV, other_R, cool_R, hot_R, spec.plausibility)
            return Ahead(side, sequences, own_RV, p_R, certain_RV, None, [], uniform_R)
        alone_RV = probabilities(own_RV, temperature(middle_R, given_R, spec), sequences, spec.plausibility)
        other_R = 1 - middle_R if side == CREATIVE else middle_R
        places = [place(o, top) for o, top in torch.stack([other_R, own_RV.amax(-1).exp()], 1).tolist()]
        allowed = [self.meter.allows(where) for where in places]
        certain_RV = alone_RV * torch.tensor(allowed, device=device)[:, None]
        return Ahead(side, sequences, own_RV, p_R, certain_RV, alone_RV, places, uniform_R)

    def skips(self, ahead: Ahead) -> list[bool]:
        """Who takes the next token without the other member. Its trust is brought up to date."""
        shares = ahead.certain_RV.sum(dim=-1).tolist()
        found = []
        for sequence, share, u in zip(ahead.sequences, shares, ahead.uniform_R.tolist(), strict=True):
            audit = not self._linear and len(sequence.output_ids) % _AUDIT == 0
            found.append(u < share and sequence.skipping and sequence.debt < self._spec.max_debt and not audit)
            sequence.trust = _MEMORY * sequence.trust + (1 - _MEMORY) * min(1.0, share)
            sequence.skipping = self._runs(sequence)
        return found

    def alone(self, ahead: Ahead, rows: list[int]) -> list[TokenEvent]:
        """The next tokens of rows that skip. Nobody has read the other member's head, and w is the dial's end."""
        sequences = [ahead.sequences[row] for row in rows]
        ids_R = decided(ahead.certain_RV[rows], ahead.uniform_R[rows])
        chosen = ahead.own_RV[rows].gather(1, ids_R[:, None])[:, 0].tolist()
        ps = [math.nan] * len(rows) if ahead.p_R is None else ahead.p_R[rows].tolist()
        creative = ahead.side == CREATIVE
        surprises = [sequence.surprise for sequence in sequences]
        numbers = [
            [logprob, logprob, p if creative else math.nan, math.nan if creative else p, float(creative)]
            for logprob, p in zip(chosen, ps, strict=True)
        ]
        events = record(sequences, ids_R.tolist(), [()] * len(rows), numbers, gated=True)
        for sequence, surprise in zip(sequences, surprises, strict=True):
            sequence.debt += 1
            sequence.skipped += 1
            if creative:  # how surprised the factual member was is found when it reads the token
                sequence.surprise = surprise
        return events

    def together(
        self, ahead: Ahead, rows: list[int], other_RKd: Tensor, theirs_RV: Tensor | None = None
    ) -> list[TokenEvent]:
        """The next tokens of rows for which the other member ran, over its debt and the last token."""
        sequences = [ahead.sequences[row] for row in rows]
        side, spec = 1 - ahead.side, self._mixture.spec
        last_Rd = other_RKd[range(len(rows)), [sequence.debt for sequence in sequences]]
        if side == FACTUAL and self._mixture.heads is not None:
            for sequence, hidden_Kd in zip(sequences, other_RKd, strict=True):
                self._catch_up(sequence, hidden_Kd)
        if theirs_RV is None:
            theirs_RV = self._mixture.members.log_probabilities(side, last_Rd)
        own_RV, own_p_R = ahead.own_RV[rows], None if ahead.p_R is None else ahead.p_R[rows]
        their_p_R = read_head(self._mixture, side, last_Rd, [sequence.surprise for sequence in sequences])
        creative_RV, factual_RV = (own_RV, theirs_RV) if ahead.side == CREATIVE else (theirs_RV, own_RV)
        p_div_R, p_dev_R = (own_p_R, their_p_R) if ahead.side == CREATIVE else (their_p_R, own_p_R)
        dial_R = torch.tensor([sequence.dial for sequence in sequences], device=own_RV.device)
        w_R = creative_weight(dial_R, p_div_R, p_dev_R, spec)
        mixed_RV = mix(creative_RV, factual_RV, w_R, spec)
        heat_R = temperature(w_R, given_temperatures(sequences, own_RV.device), spec)
        target_RV = probabilities(mixed_RV, heat_R, sequences, spec.plausibility)
        if ahead.alone_RV is not None:
            self._measure(ahead, rows, target_RV)
        ids_R = coupled(ahead.certain_RV[rows], target_RV, ahead.uniform_R[rows])
        nobody_R = torch.full_like(w_R, math.nan)
        numbers_R5 = torch.stack(
            [
                mixed_RV.gather(1, ids_R[:, None])[:, 0],
                factual_RV.gather(1, ids_R[:, None])[:, 0],
                nobody_R if p_div_R is None else p_div_R,
                nobody_R if p_dev_R is None else p_dev_R,
                w_R,
            ],
            dim=1,
        )
        for sequence in sequences:
            sequence.debt = 0
        return record(sequences, ids_R.tolist(), [()] * len(rows), numbers_R5.tolist())

    def _catch_up(self, sequence: Sequence, hidden_Kd: Tensor) -> None:
        """What the factual member makes of tokens that were taken without it: its surprise at each, and their p_dev."""
        owed = sequence.debt
        if not owed:
            return
        logprobs_KV = self._mixture.members.log_probabilities(FACTUAL, hidden_Kd[:owed])
        following = torch.tensor(sequence.output_ids[-owed:], device=hidden_Kd.device)
        surprises = [sequence.surprise]
        for logprob in logprobs_KV.gather(1, following[:, None])[:, 0].tolist():
            surprises.append(linger(surprises[-1], -logprob))
        read_K = read_head(self._mixture, FACTUAL, hidden_Kd[:owed], surprises[:-1])
        assert read_K is not None
        for index, p_dev in enumerate(read_K.tolist()):
            sequence.read_p_dev(p_dev, back=owed - index)
        sequence.surprise = surprises[-1]

    def _runs(self, sequence: Sequence) -> bool:
        """Whether skipping pays: the expected run of a chance s is 1 / (1 - s) tokens."""
        wanted = self._min_run / 2 if sequence.skipping else self._min_run
        return sequence.trust >= 1 - 1 / max(1.0, wanted)

    def _measure(self, ahead: Ahead, rows: list[int], target_RV: Tensor) -> None:
        assert ahead.alone_RV is not None
        variations = ((ahead.alone_RV[rows] - target_RV).abs().sum(dim=-1) / 2).tolist()
        for row, variation in zip(rows, variations, strict=True):
            self.meter.add(ahead.places[row], variation)


class Meter:
    """Mean total variation by place, and whether it is low enough."""

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self._sums: defaultdict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._audits = [0.0, 0.0]

    def allows(self, where: tuple[int, int]) -> bool:
        """Whether the mean there, two standard errors up, is within eps."""
        count, total, squares = self._sums[where]
        if count < _SEEN:
            return False
        mean = total / count
        return mean + 2 * math.sqrt(max(0.0, squares / count - mean * mean) / count) <= self._eps

    def add(self, where: tuple[int, int], variation: float) -> None:
        if self.allows(where):
            self._audits[0] += 1
            self._audits[1] += variation
        place = self._sums[where]
        if place[0] >= _KEPT:
            place[:] = [value / 2 for value in place]
        for index, value in enumerate((1.0, variation, variation * variation)):
            place[index] += value

    @property
    def variation(self) -> float:
        """Mean total variation of tokens that might have been skipped and were not: what skipping costs a token."""
        count, total = self._audits
        return total / max(1.0, count)


def place(other: float, top: float) -> tuple[int, int]:
    """Where the meter keeps tokens of this weight of the other member and this probability of the best token."""
    return int(10 * other), min(10, int(-math.log2(max(1 - top, 1e-9))))
