"""What a training loop calls: after every step, and now and then that is a round with the other islands.

Every rank of an island brings its own slices and takes them back; what the ranks do with an answer they agree on, so
that all of them stand in the same round. The inner optimizer's moments stay as they are. While the outer server
cannot be reached the island trains on, and brings what it has changed later.
"""

from __future__ import annotations

import math
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tigerbot.errors import SpecError, TigerError
from tigerbot.spec import Islands, TrainSpec
from tigerbot_jobs.train.islands import masters
from tigerbot_jobs.train.islands.client import Answer, Client, UnknownRound, Unreachable
from tigerbot_jobs.train.islands.layout import Piece, covers
from tigerbot_jobs.train.islands.masters import Trainable
from tigerbot_jobs.train.islands.quantise import with_feedback
from tigerbot_jobs.train.islands.server import SECRET, START_S

SERVER = "TIGER_ISLANDS_SERVER"
_JOIN_S = START_S + 120.0  # the first round waits for islands that have not come yet
_PATIENCE_S = 90.0  # for an answer, until the server has said how long its rounds wait
_REACH_S = 10.0  # for a server that does not answer at all
_AGAIN_S = 1.0  # for one that did not the last time either
_NOTHING, _UNKNOWN = -1, -2  # rounds that are none: no answer came; the server does not know the round


@dataclass(frozen=True)
class _Heard:
    """What one rank has heard from the server, for the others of its island."""

    round: int
    header: dict[str, Any] = field(default_factory=dict)
    error: TigerError | None = None


@dataclass(frozen=True)
class _Sent:
    """A delta that is under way, and the weights it was taken from."""

    step: int
    local: np.ndarray
    left_out: np.ndarray
    answer: Future[Answer] | None


def outer_of(spec: TrainSpec, steps: int) -> Outer | None:
    """The rounds of a run that is an island; None for one that is not.

    Raises:
        SpecError: it does not know where the server is, or the secret.
    """
    islands = spec.islands
    if islands is None or islands.member is None:
        return None
    address, secret = os.environ.get(SERVER) or islands.server, os.environ.get(SECRET)
    if not address or not secret:
        raise SpecError(
            f"island {islands.member} does not know its {'secret' if address else 'server'}",
            where=spec.name,
            fix=f"set {SECRET}" if address else f"set islands.server, or {SERVER}",
        )
    return Outer(islands, address, secret, steps=steps)


class Outer:
    """An island's side of the rounds, on one rank. Every method is collective over the island's process group.

    Args:
        steps: of this island's whole run; the last one ends with a round.
    """

    def __init__(self, islands: Islands, address: str, secret: str, *, steps: int) -> None:
        assert islands.member is not None
        self._islands, self._island, self._steps = islands, islands.member, steps
        self._address, self._secret = address, secret
        self._client: Client | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outer")
        self._sent: _Sent | None = None
        self._lost, self._patience_s = False, _PATIENCE_S

    def join(self, engine: Trainable, step: int) -> int:
        """Take part from here on, `step` steps done; the step to go on from.

        To be called when the process group is new and the state restored. Weights that descend from the open round's
        stay; else the global ones take their place, and the steps that are counted already are skipped.
        """
        self._sent = None
        self._form(engine)
        answer, said = self._joined(engine)
        if said["adopted_round"] == answer.round and step >= said["adopted_step"]:
            self._base, self._round = answer.weights, answer.round
            self._began, self._due = said["began_step"], said["began_step"] + self._islands.every
        else:
            known = said["adopted_round"] >= 0 or said["counted_step"] > 0
            step = max(said["began_step"], said["counted_step"]) if known else step
            self._adopt(engine, answer, answer.weights, step=step, began=step, due=step + self._left(said))
        if step >= self._steps:
            self._leave() if step == self._began else self.after_step(engine, step)
        return step

    def after_step(self, engine: Trainable, step: int) -> None:
        """`step` steps are done: bring and take what is due."""
        last = step >= self._steps
        if self._sent is not None and (last or step >= self._due or self._has_come(engine)):
            self._settle(engine, step)
        if last or step >= self._due:
            self._bring(engine, step, last=last)
            if last or not self._islands.overlap:
                self._settle(engine, step)
        if last:
            self._leave()

    def _form(self, engine: Trainable) -> None:
        """Learn what this rank holds and what the whole model is; a new island life for the server."""
        self._held = engine.slices()
        self._pieces = [Piece(part.name, part.start, part.numel) for part in self._held]
        # At stage 0 every rank holds everything: the first speaks for all.
        self._replicated = engine.zero_stage == 0
        self._speaks = bool(self._pieces) and (dist.get_rank() == 0 or not self._replicated)
        mine = {part.name: math.prod(part.shape) for part in self._held}, self._pieces if self._speaks else []
        everyone = _gathered((secrets.token_hex(8), *mine))
        self._sizes = {name: size for _, sizes, _ in everyone for name, size in sizes.items()}
        if not covers(self._sizes, [piece for _, _, pieces in everyone for piece in pieces]):
            raise TigerError("its ranks do not hold the model exactly once", where=f"island {self._island}")
        if self._client is not None:
            self._client.close()
        who = {"island": self._island, "rank": dist.get_rank(), "incarnation": everyone[0][0]}
        self._client = Client(self._address, self._secret, **who)
        self._carried = np.zeros(sum(piece.numel for piece in self._pieces), np.float32)

    def _bring(self, engine: Trainable, step: int, *, last: bool) -> None:
        local = masters.read(engine, self._held)
        delta: Any = self._base - local
        left_out = self._carried
        if self._islands.quantize == "int8":
            delta, left_out = with_feedback(delta, self._carried)
        reach_s = self._patience_s if last else _AGAIN_S if self._lost else _REACH_S
        answer = None
        if self._speaks:
            assert self._client is not None
            patience = {"patience_s": self._patience_s, "reach_s": reach_s}
            exchange = self._client.exchange
            answer = self._thread.submit(exchange, self._round, step, self._pieces, delta, self._base, **patience)
        self._sent, self._due = _Sent(step, local, left_out, answer), step + self._islands.every

    def _has_come(self, engine: Trainable) -> bool:
        """Whether every rank has its answer."""
        assert self._sent is not None
        come = torch.tensor([self._sent.answer is None or self._sent.answer.done()], device=engine.device).int()
        dist.all_reduce(come, op=dist.ReduceOp.MIN)
        return bool(come.item())

    def _settle(self, engine: Trainable, step: int) -> None:
        """Wait for the answer to what was brought, and take it if the whole island has it."""
        sent, self._sent = self._sent, None
        assert sent is not None
        answer, heard = self._hear(sent.answer.result) if sent.answer else (None, None)
        everyone = _agreed(heard)
        rounds = {one.round for one in everyone}
        self._lost = _NOTHING in rounds
        if self._lost:
            if step >= self._steps:
                raise self._unreachable()
            return
        counted = all(one.header.get("counted") for one in everyone)
        said, whole = everyone[0].header, len(rounds) == 1 and _UNKNOWN not in rounds
        if whole:
            answer = self._shared(engine, answer, *rounds)
        else:
            answer, said = self._joined(engine)
        in_time = whole and counted and answer.round == self._round + 1
        if counted:
            self._carried = sent.left_out
        due = sent.step + self._islands.every if in_time else step + self._left(said)
        # What was trained while the delta was under way is not lost: it goes on top of the new weights.
        weights = answer.weights + (masters.read(engine, self._held) - sent.local)
        dropped = 0 if counted else sent.step - max(self._began, said["counted_step"])
        self._adopt(engine, answer, weights, step=step, began=sent.step, due=due, dropped=dropped)

    def _joined(self, engine: Trainable) -> tuple[Answer, dict[str, Any]]:
        """The weights of one round, the same one on every rank, and what the server said to the first."""
        assert self._client is not None
        client, local = self._client, masters.read(engine, self._held)
        while True:
            answer = heard = None
            if self._speaks:
                answer, heard = self._hear(lambda: client.join(self._sizes, self._pieces, local, patience_s=_JOIN_S))
            everyone = _agreed(heard)
            rounds = {one.round for one in everyone}
            if _NOTHING in rounds:
                raise self._unreachable()
            if len(rounds) == 1:
                return self._shared(engine, answer, *rounds), everyone[0].header

    def _hear(self, ask: Any) -> tuple[Answer | None, _Heard]:
        try:
            answer: Answer = ask()
        except Unreachable:
            return None, _Heard(_NOTHING)
        except UnknownRound:
            return None, _Heard(_UNKNOWN)
        except TigerError as error:
            return None, _Heard(_NOTHING, error=error)
        return answer, _Heard(answer.round, answer.header)

    def _shared(self, engine: Trainable, answer: Answer | None, round: int) -> Answer:
        """The answer as this rank takes it: its own, or the one that the first rank got for all."""
        if not self._replicated:
            return answer or Answer(round, np.zeros(0, np.float32), {})
        weights = torch.from_numpy(answer.weights if answer else np.empty_like(self._carried)).to(engine.device)
        dist.broadcast(weights, src=0)
        return Answer(round, weights.cpu().numpy(), answer.header if answer else {})

    def _adopt(
        self,
        engine: Trainable,
        answer: Answer,
        weights: np.ndarray,
        *,
        step: int,
        began: int,
        due: int,
        dropped: int = 0,
    ) -> None:
        """Stand in the answer's round, on these weights."""
        masters.write(engine, self._held, weights, step=step)
        self._base, self._round, self._began, self._due = answer.weights, answer.round, began, due
        self._patience_s = answer.header.get("patience_s", self._patience_s)
        if dist.get_rank() == 0 and self._client is not None:
            self._client.adopted(answer.round, step, began, dropped)

    def _left(self, said: dict[str, Any]) -> int:
        """Steps that fit into what is left of the open round: a newcomer arrives with the others."""
        return max(1, round(self._islands.every * (1 - said["passed"])))

    def _leave(self) -> None:
        if dist.get_rank() == 0 and self._client is not None:
            self._client.leave()
        dist.barrier()
        if self._client is not None:
            self._client.close()

    def _unreachable(self) -> TigerError:
        return TigerError(
            "the outer server does not answer",
            where=self._address,
            fix="start it; the same command goes on from the last checkpoint",
        )


def _gathered(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _agreed(mine: _Heard | None) -> list[_Heard]:
    """What every rank that speaks has heard; the first refusal is everybody's error."""
    everyone = [one for one in _gathered(mine) if one is not None]
    for one in everyone:
        if one.error is not None:
            raise one.error
    return everyone
