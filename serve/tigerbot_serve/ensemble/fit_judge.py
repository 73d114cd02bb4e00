"""Fit the judge's threshold: how doubtful drafts of validation questions are, and how many of them one can rewrite.

    python -m tigerbot_serve.ensemble.fit_judge serve/ensemble.yaml questions.jsonl 0.35

Questions are those of `fit.py`, and not what the judge is measured on afterwards. What is printed has a `judge:` block to
paste: the lowest threshold by which at most the given share of drafts is doubted. A rewrite costs about as much as a
draft, so that share is what the mean latency grows by.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tigerbot.chat import Message, encode_chat
from tigerbot.errors import InputError, ModelError, TigerError
from tigerbot.spec import ServeSpec, load_spec
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request, TokenEvent
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.ensemble.fit import Case, read_cases
from tigerbot_serve.ensemble.judge import score
from tigerbot_serve.scale.aliases import with_folders

_ANSWER = 64  # tokens


@dataclass(frozen=True)
class Draft:
    """A first answer: its doubt, as the judge has it, and whether it was right."""

    doubt: float
    right: bool


def threshold_for(doubts: Sequence[float], share: float) -> float:
    """The lowest threshold that at most a share of the doubts is above."""
    ordered = sorted(doubts, reverse=True)
    allowed = int(share * len(ordered))
    return ordered[allowed] if allowed < len(ordered) else 0.0


def drafts(engine: Engine, cases: Sequence[Case], dial: float) -> list[Draft]:
    """The engine's first answer to every question, judged and not rewritten."""

    async def one(number: int, case: Case) -> Draft:
        message: Message = {"role": "user", "content": case.prompt}
        ids = encode_chat(engine.tokenizer, [message], generation_prompt=True)[0]
        request = Request(tuple(ids), _ANSWER, dial, seed=number, verify=True, max_rewrites=0)
        events = [event async for event in engine.submit(request, asyncio.get_running_loop())]
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        end = events[-1]
        if not isinstance(end, FinishEvent) or end.finish_reason == "error" or end.summary.verdict == "unverified":
            raise ModelError(
                "has nothing to judge with", where=f"dial {dial:g}", fix="serve two members and their heads"
            )
        answer = tokens[:-1] if end.finish_reason == "stop" else tokens
        p_devs = [token.p_dev for token in answer if token.p_dev is not None]
        return Draft(score(p_devs), case.right("".join(token.text for token in tokens)))

    async def each() -> list[Draft]:
        return [await one(number, case) for number, case in enumerate(cases)]

    return asyncio.run(each())


def told(found: Sequence[Draft], share: float) -> str:
    """What the drafts say about the threshold for a share of rewrites."""
    doubts, right = np.array([one.doubt for one in found]), np.array([one.right for one in found])
    threshold = threshold_for(doubts.tolist(), share)
    doubted = doubts > threshold
    return "\n".join(
        [
            f"# {len(found)} drafts, {np.mean(~right):.0%} wrong; {np.mean(doubted):.0%} are doubted:",
            f"# {_share(doubted[~right])} of the wrong ones, {_share(doubted[right])} of the right ones",
            f"judge: {{threshold: {threshold:.3g}}}",
        ]
    )


def _share(doubted: np.ndarray) -> str:
    return f"{np.mean(doubted):.0%}" if len(doubted) else "none"


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(f"got {word!r}, wants a number", where="share", fix="leave it out for 0.35") from None


def main(spec_file: str, questions: str, share: float = 0.35) -> None:
    """Print the block for a serve spec.

    Raises:
        InputError: the spec is of another kind, or the share is none.
        DataError: the questions cannot be read.
        ModelError: the spec has no heads, or one model alone.
    """
    spec = load_spec(spec_file)
    if not isinstance(spec, ServeSpec):
        raise InputError(f"is of kind {spec.kind}, wants serve", where=spec_file, fix="name a serve spec")
    if not 0 < share < 1:
        raise InputError(f"got {share:g}, wants a share between 0 and 1", where="share", fix="leave it out for 0.35")
    cases = read_cases(questions)
    engine = build_engine(with_folders(spec))
    engine.start()
    try:
        print(told(drafts(engine, cases, spec.dial.default), share))
    finally:
        engine.stop()


if __name__ == "__main__":
    try:
        if len(sys.argv) not in (3, 4):
            raise InputError(
                "wants a serve spec and a file of questions", where="arguments", fix="see the module's docs"
            )
        main(sys.argv[1], sys.argv[2], *map(_number, sys.argv[3:]))
    except TigerError as error:
        print(f"fit_judge: {error}", file=sys.stderr)
        sys.exit(2)
