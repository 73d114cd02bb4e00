"""What judging and rewriting is worth: errors, harm and latency through the real engine, one request after another.

Ways that are compared on the same questions and seeds: the draft as it is; rewrites without evidence; rewrites with
evidence from a corpus of the town's statements; and the better of two drafts by the judge's score, which spends about
as many tokens as a draft and a rewrite.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot.chat import encode_chat
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_jobs.data.world import LANGUAGES, Question, World, statements
from tigerbot_jobs.evaluate.measure import bootstrap
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request, TokenEvent
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.ensemble.fit import Case
from tigerbot_serve.ensemble.fit_judge import drafts, threshold_for
from tigerbot_serve.ensemble.judge import score

REWRITTEN = 0.35  # of the drafts, at most
WAYS = ("draft", "rewrite", "rewrite with evidence", "best of 2")


@dataclass(frozen=True)
class Told:
    """One answer."""

    text: str
    seconds: float
    tokens: int
    verdict: str
    doubt: float


def rewrites(raw: dict[str, Any], questions: Sequence[Question], folder: Path, *, dial: float) -> dict[str, Any]:
    """The table of ways; `raw` is a serve spec without plug-ins."""
    plugins = [{"name": "search", "corpus": str(_corpus(folder))}]
    spec = parse_spec({**raw, "plugins": plugins})
    assert isinstance(spec, ServeSpec)
    engine = build_engine(spec)
    engine.start()
    try:
        _ask(engine, questions[0], dial, 0, "rewrite with evidence")  # warm
        found: dict[str, list[Told]] = {way: [] for way in WAYS}
        for index, question in enumerate(questions):
            for way in WAYS[index % len(WAYS) :] + WAYS[: index % len(WAYS)]:
                found[way].append(_ask(engine, question, dial, index, way))
    finally:
        engine.stop()
    right = {
        way: np.array([q.fact_check(one.text) for q, one in zip(questions, told, strict=True)])
        for way, told in found.items()
    }
    return {way: _row(way, found, right) for way in WAYS}


def fitted_threshold(raw: dict[str, Any], asked: Sequence[Question], count: int, *, dial: float) -> float:
    """The judge's threshold by as many validation questions, of facts that none of `asked` is about."""
    taken = {question.fact.id for question in asked}
    fresh = [one for one in World(1).eval_questions(count + 2 * len(asked), seed=7) if one.fact.id not in taken][:count]
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    engine = build_engine(spec)
    engine.start()
    try:
        found = drafts(engine, [Case(one.question, (one.fact.value.in_(one.lang),)) for one in fresh], dial)
    finally:
        engine.stop()
    return threshold_for([one.doubt for one in found], REWRITTEN)


def _row(way: str, found: dict[str, list[Told]], right: dict[str, np.ndarray]) -> dict[str, Any]:
    drafts, told = found["draft"], found[way]
    wrong, wrong_drafts = 1.0 - right[way], 1.0 - right["draft"]
    seconds = np.array([one.seconds for one in told])
    base = float(np.mean([one.seconds for one in drafts]))
    return {
        "errors": vars(bootstrap(wrong.tolist())),
        "errors_ratio": vars(_ratio(wrong, wrong_drafts)),
        "harm": float(np.mean(right["draft"] & ~right[way])),
        "rewritten": float(np.mean([one.verdict == "rewritten" for one in told])),
        "flagged": float(np.mean([one.verdict == "flagged" for one in told])),
        "flagged_are_wrong": _share(wrong, [one.verdict == "flagged" for one in told]),
        "mean_latency_ratio": float(seconds.mean()) / base,
        "p95_latency_ratio": float(np.quantile(seconds, 0.95)) / base,
        "mean_ms": 1000 * float(seconds.mean()),
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "tokens": float(np.mean([one.tokens for one in told])),
    }


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> Any:
    """Errors over the draft's errors, both of the same questions in each draw."""
    picks = np.random.default_rng(1).integers(0, len(ours), (4000, len(ours)))
    ratios = ours[picks].mean(axis=1) / np.maximum(theirs[picks].mean(axis=1), 1e-9)
    low, high = np.quantile(ratios, (0.025, 0.975))
    found = bootstrap([0.0])
    return type(found)(float(ours.mean() / max(theirs.mean(), 1e-9)), float(low), float(high))


def _share(values: np.ndarray, where: Sequence[bool]) -> float | None:
    picked = values[np.array(where)]
    return float(picked.mean()) if len(picked) else None


def _ask(engine: Engine, question: Question, dial: float, seed: int, way: str) -> Told:
    if way != "best of 2":
        verify = way != "draft"
        return _told(engine, question, dial, seed, verify, 1, ("search",) if "evidence" in way else ())
    one, other = (_told(engine, question, dial, 2 * seed + add * 100_003, True, 0, ()) for add in (0, 1))
    best = one if one.doubt <= other.doubt else other
    return Told(best.text, one.seconds + other.seconds, one.tokens + other.tokens, best.verdict, best.doubt)


def _told(
    engine: Engine, question: Question, dial: float, seed: int, verify: bool, most: int, plugins: tuple[str, ...]
) -> Told:
    message = {"role": "user", "content": question.question}
    ids = encode_chat(engine.tokenizer, [message], generation_prompt=True)[0]  # type: ignore[list-item]
    request = Request(
        tuple(ids),
        24,
        dial,
        seed=seed,
        verify=verify,
        max_rewrites=most,
        plugins=plugins,
        messages=(message,),  # type: ignore[arg-type]
        want_tokens=True,
    )
    began = time.perf_counter()
    events = asyncio.run(_events(engine, request))
    seconds = time.perf_counter() - began
    end = events[-1]
    assert isinstance(end, FinishEvent)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    spent = end.usage.completion_tokens + end.usage.draft_tokens
    doubt = score([token.p_dev for token in tokens[:-1] if token.p_dev is not None])
    return Told("".join(token.text for token in tokens), seconds, spent, end.summary.verdict, doubt)


async def _events(engine: Engine, request: Request) -> list[Any]:
    return [event async for event in engine.submit(request, asyncio.get_running_loop())]


def _corpus(folder: Path) -> Path:
    """Every fact of the town told once in each language, as a corpus to search."""
    path = folder / "town.jsonl"
    facts = World(1).facts
    rows = [{"id": f"{fact.id}/{lang}", "text": statements(fact, lang)[0]} for fact in facts for lang in LANGUAGES]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path
