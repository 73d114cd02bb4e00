"""`kind: eval`: the closed world's questions and creative prompts at several dials, through the real endpoint."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from tigerbot.progress import stage
from tigerbot.runs import Run, write_json
from tigerbot.spec import EvalSpec
from tigerbot_jobs.data import creative
from tigerbot_jobs.data.world import LANGUAGES, World, languages_of
from tigerbot_jobs.evaluate.ask import Answer, Ask, ask_all
from tigerbot_jobs.evaluate.measure import DialRow, as_dict, bootstrap, distinct_valid, paired, per_item


@dataclass(frozen=True)
class CreativePrompt:
    """A chat prompt of a kind of text in a language."""

    kind: str
    lang: str
    text: str


def run(run: Run) -> dict[str, Any]:
    """Measure; write `table.json` and `answers.json` into the run's folder."""
    spec = run.spec
    assert isinstance(spec, EvalSpec)
    questions = World(seed=1).eval_questions(spec.questions, seed=spec.seeds[0], languages=languages_of(spec.lang))
    prompts = creative_prompts(spec.creative_prompts, languages_of(spec.lang))
    factual = [Ask(q.question, dial, seed, 24) for dial in spec.dials for seed in spec.seeds for q in questions]
    free = [
        Ask(p.text, dial, 1000 * i + sample, 96)
        for dial in spec.dials
        for i, p in enumerate(prompts)
        for sample in range(spec.samples)
    ]
    shown = Ask(questions[0].question, 0.5, spec.seeds[0], 48, verify=True, tokens=True)
    answers = _ask(spec, [*factual, *free, shown])

    rows, accuracy, diversity = [], {}, {}
    per_dial, per_dial_free = len(factual) // len(spec.dials), len(free) // len(spec.dials)
    for index, dial in enumerate(spec.dials):
        said = answers[index * per_dial : (index + 1) * per_dial]
        wrote = answers[len(factual) + index * per_dial_free :][:per_dial_free]
        asked = questions * len(spec.seeds)
        right = [float(q.fact_check(a.text)) for q, a in zip(asked, said, strict=True)]
        accuracy[dial] = per_item(range_keys(len(questions), len(spec.seeds)), right)
        novelty, valid = _diversity(prompts, wrote, spec.samples)
        diversity[dial] = novelty
        weights = [a.ensemble["w_mean"] for a in said + wrote if a.ensemble.get("w_mean") is not None]
        rows.append(
            DialRow(
                dial=dial,
                example=said[0].text,
                accuracy=bootstrap(list(accuracy[dial].values())),
                diversity=bootstrap(novelty),
                valid=valid,
                w_mean=sum(weights) / len(weights) if weights else None,
            )
        )
    low, high = min(spec.dials), max(spec.dials)
    table = {
        "question": questions[0].question,
        "rows": [as_dict(row) for row in rows],
        "accuracy_gain": vars(paired(list(accuracy[low].values()), list(accuracy[high].values()))),
        "diversity_gain": vars(paired(diversity[high], diversity[low])),
        "questions": len(questions),
        "seeds": len(spec.seeds),
        "shown": {"prompt": shown.prompt, "text": answers[-1].text, "ensemble": answers[-1].ensemble},
    }
    write_json(run.folder / "table.json", table)
    write_json(
        run.folder / "answers.json",
        [[a.prompt, a.dial, a.seed, b.text] for a, b in zip(factual, answers, strict=False)],
    )
    return run.finish(table)


def creative_prompts(count: int, languages: tuple[str, ...] = LANGUAGES) -> list[CreativePrompt]:
    """`count` prompts, languages in turn."""
    pools = {lang: creative.prompts(lang) for lang in languages}
    picked = []
    for index in range(count):
        lang = languages[index % len(languages)]
        kind, text = pools[lang][(index // len(languages) * 7) % len(pools[lang])]
        picked.append(CreativePrompt(kind, lang, text))
    return picked


def range_keys(items: int, seeds: int) -> list[int]:
    """Item index of every answer when all items are asked once per seed, seed by seed."""
    return list(range(items)) * seeds


def _diversity(prompts: list[CreativePrompt], wrote: list[Answer], samples: int) -> tuple[list[float], float]:
    """Diversity of each prompt, and the share of valid answers over all."""
    novelty, valid_count = [], 0
    for index, prompt in enumerate(prompts):
        texts = [answer.text for answer in wrote[index * samples : (index + 1) * samples]]
        valid = [creative.valid(prompt.kind, prompt.lang, text) for text in texts]
        valid_count += sum(valid)
        novelty.append(distinct_valid(texts, valid))
    return novelty, valid_count / max(len(wrote), 1)


def _ask(spec: EvalSpec, asks: list[Ask]) -> list[Answer]:
    key = os.environ.get(spec.api_key_env, "")
    with stage(f"asking {len(asks):,} questions at {len(spec.dials)} dials", total=len(asks), unit="answers") as shown:
        return asyncio.run(
            ask_all(spec.url, asks, api_key=key, concurrency=spec.concurrency, done=lambda n: shown.update(n))
        )
