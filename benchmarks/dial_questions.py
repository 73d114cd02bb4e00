"""Validation questions and prompts of the closed world for `jobs/fit_dial.yaml`, none of which `dial_quality` asks.

python -m benchmarks.dial_questions tiger-runs/dial-questions
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tigerbot_jobs.data import creative
from tigerbot_jobs.data.world import LANGUAGES, World
from tigerbot_jobs.evaluate.job import CreativePrompt, creative_prompts

QUESTIONS, PROMPTS = 120, 12
MEASURED = ((200, 1), (300, 2))  # (questions, seed) that dial_quality asks


def write(folder: Path, questions: int = QUESTIONS, prompts: int = PROMPTS) -> None:
    """`questions.jsonl` and `prompts.jsonl` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(1)
    used = {question.fact.id for count, seed in MEASURED for question in world.eval_questions(count, seed=seed)}
    fresh = [question for question in world.eval_questions(2000, seed=101) if question.fact.id not in used]
    _lines(
        folder / "questions.jsonl",
        [
            {
                "prompt": one.question,
                "accept": [one.fact.value.in_(one.lang)],
                "reject": [
                    v.in_(one.lang)
                    for v in one.fact.relation.values
                    if _other(v.in_(one.lang), one.fact.value.in_(one.lang))
                ],
            }
            for one in fresh[:questions]
        ],
    )
    measured = {prompt.text for prompt in creative_prompts(16)}
    pool = [
        CreativePrompt(kind, lang, text)
        for index in range(60)
        for lang in LANGUAGES
        for kind, text in [creative.prompts(lang)[(5 + 11 * index) % len(creative.prompts(lang))]]
        if text not in measured
    ]
    _lines(
        folder / "prompts.jsonl",
        [{"prompt": one.text, "pattern": creative.pattern(one.kind, one.lang)} for one in pool[:prompts]],
    )


def _other(value: str, right: str) -> bool:
    """Whether a value contradicts the right one: a part of it (9 in 39) does not."""
    return value != right and value not in right


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "tiger-runs/dial-questions"))
