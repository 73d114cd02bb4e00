"""Where a text may go on in many ways: labels for p_div, from several continuations of the same beginning.

The label of a place is the chance that two continuations of it differ (`1 - sum p_c^2` over clusters, unbiased). Where a
factual question's answer begins nothing should diverge, however unsure the model is: not knowing is p_dev's matter.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tigerbot.chat import encode_chat, end_token_ids
from tigerbot_jobs.data import creative
from tigerbot_jobs.data.world import LANGUAGES, Fact, questions
from tigerbot_jobs.heads.examples import Example
from tigerbot_jobs.heads.models import continued

PLACES = 5  # of each text
TEXT_TOKENS = 40
HORIZON = 3  # tokens that make two continuations the same or different: about one word


def branching_examples(
    model: Any, tokenizer: Any, prompts: list[tuple[str, str, str]], *, continuations: int, seed: int
) -> list[Example]:
    """Examples of creative answers with a soft label at `PLACES` places of each; prompts are (kind, lang, text)."""
    rng = random.Random(f"branching-{seed}")
    asked = [prompt_ids(tokenizer, text) for _, _, text in prompts]
    ends = end_token_ids(tokenizer)
    texts = continued(model, asked, TEXT_TOKENS, ends=ends, temperature=1.0, seed=seed)
    beginnings: list[list[int]] = []
    for prompt, text in zip(asked, texts, strict=True):
        places = rng.sample(range(len(text) + 1), min(PLACES, len(text) + 1))
        beginnings += [prompt + text[:place] for place in sorted(places)]
    repeated = [beginning for beginning in beginnings for _ in range(continuations)]
    further = continued(model, repeated, HORIZON, ends=ends, temperature=1.0, seed=seed + 1)
    examples = []
    for index, beginning in enumerate(beginnings):
        mine = further[index * continuations : (index + 1) * continuations]
        examples.append(Example(tuple(beginning), ((len(beginning) - 1, differing(mine)),), len(beginning)))
    return examples


def settled_examples(
    tokenizer: Any, facts: list[Fact], seed: int, languages: Sequence[str] = LANGUAGES
) -> list[Example]:
    """Factual questions, where the answer is about to begin: nothing should diverge there."""
    rng = random.Random(f"settled-{seed}")
    found = []
    for fact in facts:
        for lang in languages:
            ids = prompt_ids(tokenizer, rng.choice(questions(fact, lang))[0])
            found.append(Example(tuple(ids), ((len(ids) - 1, 0.0),), len(ids)))
    return found


def creative_prompts(count: int, seed: int, languages: Sequence[str] = LANGUAGES) -> list[tuple[str, str, str]]:
    """(kind, lang, text), languages in turn, none twice."""
    rng = random.Random(f"prompts-{seed}")
    pools = {lang: rng.sample(creative.prompts(lang), len(creative.prompts(lang))) for lang in languages}
    kinds = len(languages)
    count = min(count, kinds * min(map(len, pools.values())))
    return [
        (kind, languages[index % kinds], text)
        for index in range(count)
        for kind, text in [pools[languages[index % kinds]][index // kinds]]
    ]


def differing(continuations: list[list[int]]) -> float:
    """The chance that two of these differ, unbiased: 0 when all are equal, 1 when none are."""
    counts = Counter(tuple(ids) for ids in continuations)
    total = len(continuations)
    same = sum(count * (count - 1) for count in counts.values())
    return 1.0 - same / (total * (total - 1)) if total > 1 else 0.0


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """A user's message up to where the answer begins."""
    return encode_chat(tokenizer, [{"role": "user", "content": text}], generation_prompt=True)[0]
