"""What becomes of a held answer between its last token and its being given: judge, look up, rewrite, judge again.

    draft -> reading -> no doubt: ok
                     -> doubt: look up -> reading with the evidence -> rewrite -> reading -> the better one is given

Every method takes a ticket one step further and says what it wants next: a `Reading` to prefill, a `Sequence` to
decode, or nothing. Nothing means that the answer is settled, or that plug-ins are asked (`ticket.looking_up`). It knows nothing
about slots, and what fails in here costs the verdict, never the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tigerbot.spec import DialSpec
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.ticket import Ticket
from tigerbot_serve.ensemble.evidence import Inquiry, Span, doubtful_spans
from tigerbot_serve.ensemble.judge import Judge, Opinion, Reading
from tigerbot_serve.ensemble.pull import Pull
from tigerbot_serve.ensemble.quoting import prompt_with_evidence, same_language

Wanted = Reading | Sequence | None
LOOKUP_S = 5.0  # for all plug-ins of a request together


@dataclass(frozen=True)
class Ground:
    """What rewrites are made from and judged on: the prompt, with evidence or without, and the evidence's pull."""

    prompt_ids: tuple[int, ...]
    pull: Pull | None = None


class Review:
    """The judge's way with tickets.

    Args:
        max_length: longest prompt and answer together.
        wake: called from other threads when a lookup is done.
    """

    def __init__(
        self,
        judge: Judge,
        dial: DialSpec,
        end_ids: frozenset[int],
        max_length: int,
        wake: Callable[[], None],
    ) -> None:
        self._judge, self._dial, self._end_ids, self._max_length, self._wake = judge, dial, end_ids, max_length, wake
        self._tokenizer: Any = judge.members.tokenizer

    def ended(self, ticket: Ticket) -> Wanted:
        """An attempt's text is whole."""
        if not ticket.rewrites:
            reading = self._reading(ticket, ticket.current) if ticket.to_judge else None
            if reading is None:
                return None
            ticket.phase("judge")
            return self._read(ticket, reading)
        if ticket.current.text == ticket.kept.text:
            ticket.reasons.append("the rewrite says the same")
            return self._settled(ticket)
        if not ticket.to_judge or not same_language(ticket.attempts[0].text, ticket.current.text):
            ticket.reasons.append("the rewrite left the form or language of the draft")
            return self._next(ticket)
        reading = self._reading(ticket, ticket.current)
        return self._next(ticket) if reading is None else self._read(ticket, reading)

    def judged(self, ticket: Ticket, reading: Reading) -> Wanted:
        """The judge has read what it was given."""
        return self._considered(ticket, reading.opinion())

    def _read(self, ticket: Ticket, reading: Reading) -> Wanted:
        """What is to be read to judge the current attempt: nothing more, where decoding has read it all."""
        heard = self._judge.heard(ticket.current) if ticket.ground is None else None
        return reading if heard is None else self._considered(ticket, heard)

    def _considered(self, ticket: Ticket, opinion: Opinion) -> Wanted:
        if ticket.opinion is None:
            ticket.keep(opinion)
            ticket.draft_spans = self._spans(ticket)
        elif ticket.current is ticket.kept:  # the draft once more, with the evidence
            ticket.opinion = opinion
            return self._rewrite(ticket)
        elif self._judge.better(opinion, ticket.opinion):
            ticket.keep(opinion)
            ticket.reasons.append("the rewrite is less doubtful")
        else:
            ticket.reasons.append("the rewrite is no better")
        return self._next(ticket)

    def looked_up(self, ticket: Ticket) -> Wanted:
        """Plug-ins have answered, or had their time."""
        assert ticket.lookup is not None
        ticket.looked_up = True
        ticket.evidence = ticket.lookup.found
        ticket.reasons += ticket.lookup.reasons
        if not ticket.evidence:
            ticket.reasons.append("nothing was found")
            return self._next(ticket)
        ticket.ground = self._ground(ticket)
        return self._reading(ticket, ticket.kept)

    def settle(self, ticket: Ticket) -> None:
        """Something in here failed: the draft is given for what it is."""
        ticket.lookup, ticket.verdict = None, "unverified"
        ticket.reasons.append("the judge failed")

    def _next(self, ticket: Ticket) -> Wanted:
        assert ticket.opinion is not None
        if not self._judge.doubts(ticket.opinion) or ticket.rewrites >= ticket.request.max_rewrites:
            return self._settled(ticket)
        if not ticket.time_for_a_rewrite:
            ticket.reasons.append("no time was left for a rewrite")
            return None
        names = [name for name in ticket.request.plugins if name in self._judge.lookups.names]
        if names and ticket.lookup is None:
            ticket.phase("search")
            ticket.lookup = self._judge.lookups.start(names, self._inquiry(ticket), LOOKUP_S, self._wake)
            return None
        if not ticket.evidence and ticket.request.dial <= 0:
            ticket.reasons.append("there is nothing new to rewrite it with")  # the factual member alone wrote it
            return self._settled(ticket)
        return self._rewrite(ticket)

    def _rewrite(self, ticket: Ticket) -> Sequence | None:
        """Another attempt by the factual member alone; its draws continue the draft's, so the seed still decides."""
        if not ticket.time_for_a_rewrite:
            ticket.reasons.append("no time was left for a rewrite")
            return None
        ticket.phase("rewrite")
        draft, ground, cool = ticket.attempts[0], self._ground_of(ticket), self._dial.temperature_factual
        given = ticket.request.temperature
        ticket.judge_tokens += len(ground.prompt_ids) - len(draft.prompt_ids)
        attempt = Sequence(
            replace(ticket.request, prompt_ids=ground.prompt_ids, prompt_logprobs=None),
            self._tokenizer,
            self._end_ids,
            max_tokens=min(draft.max_tokens, self._max_length - len(ground.prompt_ids)),
            dial=0.0,
            temperature=cool if given is None else min(cool, given),
            rng=draft.rng,
        )
        attempt.pull = ground.pull
        return attempt

    def _settled(self, ticket: Ticket) -> None:
        assert ticket.opinion is not None
        ticket.verdict = self._judge.verdict(ticket.opinion, ticket.kept is not ticket.attempts[0])
        ticket.spans = self._spans(ticket) if ticket.verdict == "flagged" else ()

    def _reading(self, ticket: Ticket, attempt: Sequence) -> Reading | None:
        ground = self._ground_of(ticket)
        ids = [token.token_id for token in attempt.answer]
        if len(ground.prompt_ids) + len(ids) > self._max_length:
            return None
        return self._judge.reading(ticket.request.dial, ground.prompt_ids, ids, ground.pull)

    def _ground_of(self, ticket: Ticket) -> Ground:
        return ticket.ground or Ground(ticket.request.prompt_ids)

    def _ground(self, ticket: Ticket) -> Ground:
        request, spec = ticket.request, self._judge.spec
        pull = prompt_ids = None
        if spec.evidence != "prompt":
            question = self._inquiry(ticket).question
            copies = max(1, len(ticket.draft_spans))
            pull = Pull(self._tokenizer, ticket.evidence, question, strength=spec.pull, copies=copies)
        if spec.evidence != "pull":
            prompt_ids = prompt_with_evidence(
                self._tokenizer,
                request.messages,
                ticket.evidence,
                seed=request.seed,
                max_characters=spec.evidence_characters,
            )
        room = self._max_length - ticket.attempts[0].max_tokens
        if prompt_ids is None or len(prompt_ids) > room:
            prompt_ids = request.prompt_ids
        return Ground(prompt_ids, pull)

    def _inquiry(self, ticket: Ticket) -> Inquiry:
        asked = [message["content"] for message in ticket.request.messages if message["role"] == "user"]
        return Inquiry(asked[-1] if asked else "", ticket.kept.text, ticket.draft_spans)

    def _spans(self, ticket: Ticket) -> tuple[Span, ...]:
        return doubtful_spans(ticket.kept.answer, self._judge.spec.threshold)
