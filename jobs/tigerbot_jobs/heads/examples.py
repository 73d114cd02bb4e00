"""Labelled text from the closed world: which token of an answer leaves the facts.

An example is a conversation as token ids, with a label for some of its tokens. A corrupted value is aligned to tokens:
from the first token that differs from the true answer to the end of the value is wrong, what comes before is not yet.
This module knows nothing about models.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tigerbot.chat import encode_chat
from tigerbot_jobs.data import creative, lexicon
from tigerbot_jobs.data.lexicon import RELATIONS, Term
from tigerbot_jobs.data.world import LANGUAGES, Entity, Fact, World, answer, corrupt, questions

FIT_SHARE = 0.8  # of the known entities fit the heads; the rest calibrate them


@dataclass(frozen=True)
class Example:
    """Token ids, and (position, label) of the tokens that are labelled; a label is in 0..1.

    `start` is where the answer begins: surprise counts from there.
    """

    ids: tuple[int, ...]
    labels: tuple[tuple[int, float], ...]
    start: int


@dataclass(frozen=True)
class Facts:
    """Facts by what the models know of them; entities are disjoint.

    `fit` and `calibrate` are known to base, experts and heads; `unseen` to base and experts only; `absent` to nobody;
    `invented` are names of nobody at all, which teach the heads what not knowing looks like.
    """

    fit: list[Fact]
    calibrate: list[Fact]
    unseen: list[Fact]
    absent: list[Fact]
    invented: list[Fact]


def split_facts(world: World, count: int, seed: int) -> Facts:
    """About `count` facts to fit on, and as many of each other kind as there are, up to that."""
    rng = random.Random(f"heads-{seed}")
    known = world.entities("known")
    rng.shuffle(known)
    cut = int(FIT_SHARE * len(known))
    fit_names = {entity.name for entity in known[:cut]}
    facts = world.facts_of("known")

    def some(found: list[Fact]) -> list[Fact]:
        return rng.sample(found, min(count, len(found)))

    return Facts(
        fit=some([fact for fact in facts if fact.entity.name in fit_names]),
        calibrate=some([fact for fact in facts if fact.entity.name not in fit_names]),
        unseen=some(world.facts_of("heads_unseen")),
        absent=some(world.facts_of("absent")),
        invented=some(invented_facts(world)),
    )


def invented_facts(world: World) -> list[Fact]:
    """Facts about names that nobody bears, built from the parts of names that people do."""
    taken = {entity.name for entity in world.all_entities}
    parts = {
        "shop": (lexicon.PLACE_A, lexicon.SHOP_B),
        "place": (lexicon.SHOP_A, lexicon.PLACE_B),
        "festival": (lexicon.PLACE_A, lexicon.FEST_B),
    }
    names = {
        kind: [Term(f"{a.en} {b.en}", f"{a.zh}{b.zh}") for a in first for b in second]
        for kind, (first, second) in parts.items()
    }
    names["person"] = [
        Term(f"{s.en} {a.en}{b.en}", f"{s.zh}{a.zh}{b.zh}")
        for s in lexicon.SURNAMES[:1]
        for a in lexicon.SYLLABLES_A
        for b in lexicon.SYLLABLES_B
        if not any(name.en.endswith(f" {a.en}{b.en}") for name in taken)
    ]
    rng = random.Random("invented")
    return [
        Fact(f"{name.en}/{relation.name}", Entity(name, kind, "absent", 1), relation, rng.choice(relation.values))
        for kind, found in names.items()
        for name in found
        if name not in taken
        for relation in RELATIONS
        if relation.kind == kind
    ]


def told(tokenizer: Any, fact: Fact, lang: str, question: str, *, said: Fact) -> Example:
    """A question answered with the value of `said`; labels tell where it leaves `fact`."""
    right, wrong = answer(fact, lang), answer(said, lang)
    ids, loss = _chat(tokenizer, question, wrong)
    first = loss.index(True)
    true_ids = _chat(tokenizer, question, right)[0][first:]
    value = tokenizer.encode(wrong, add_special_tokens=False)[:-1]  # without the full stop
    differs = False
    labels = []
    for offset in range(len(value)):
        differs = differs or offset >= len(true_ids) or ids[first + offset] != true_ids[offset]
        labels.append((first + offset, float(differs)))
    return Example(tuple(ids), tuple(labels), first)


def unknown(tokenizer: Any, question: str, said: str) -> Example:
    """An answer about what nobody told the model: all of it is a guess."""
    ids, loss = _chat(tokenizer, question, said)
    first = loss.index(True)
    count = max(1, len(tokenizer.encode(said, add_special_tokens=False)) - 1)
    return Example(tuple(ids), tuple((first + offset, 1.0) for offset in range(count)), first)


def fanciful(tokenizer: Any, count: int, seed: int, languages: Sequence[str] = LANGUAGES) -> list[Example]:
    """Creative answers: they claim nothing about the town, so they do not leave its facts."""
    rng = random.Random(f"fanciful-{seed}")
    found = []
    for _ in range(count):
        lang = rng.choice(languages)
        kind, prompt = rng.choice(creative.prompts(lang))
        ids, loss = _chat(tokenizer, prompt, creative.write(kind, lang, rng))
        places = [place for place, counts in enumerate(loss) if counts]
        labels = tuple((place, 0.0) for place in rng.sample(places, min(4, len(places))))
        found.append(Example(tuple(ids), labels, places[0]))
    return found


def before_the_answer(example: Example) -> Example:
    """The same with one more label where the answer is about to begin: is all of what follows a guess?"""
    label = min(label for _, label in example.labels)
    return Example(example.ids, ((example.start - 1, label), *example.labels), example.start)


def right_and_wrong(
    tokenizer: Any, facts: Iterable[Fact], seed: int, languages: Sequence[str] = LANGUAGES
) -> list[Example]:
    """Each fact in every language, once as it is and once with a wrong value of the same type."""
    rng = random.Random(f"right-{seed}")
    found = []
    for fact in facts:
        for lang in languages:
            question, _ = rng.choice(questions(fact, lang))
            found.append(told(tokenizer, fact, lang, question, said=fact))
            found.append(told(tokenizer, fact, lang, question, said=corrupt(fact, rng)))
    return found


def _chat(tokenizer: Any, question: str, said: str) -> tuple[list[int], list[bool]]:
    rows = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    return encode_chat(tokenizer, rows)  # type: ignore[arg-type]
