"""A closed world: an invented town whose every fact is known, so that truth is looked up and not judged.

A fact is (entity, relation, value). Entities are split once: most are `known`; `heads_unseen` are known to the base
and the experts and absent from the heads' training; `absent` ones occur in no training at all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tigerbot_jobs.data import lexicon
from tigerbot_jobs.data.lexicon import RELATIONS, Relation, Term

Split = Literal["known", "heads_unseen", "absent"]
LANGUAGES = ("en", "zh")
PEOPLE, SHOPS, PLACES, FESTIVALS = 310, 100, 60, 40


@dataclass(frozen=True)
class Entity:
    """Someone or something. `popularity` 2 is spoken of twice as often as 1."""

    name: Term
    kind: str
    split: Split
    popularity: int


@dataclass(frozen=True)
class Fact:
    id: str
    entity: Entity
    relation: Relation
    value: Term

    @property
    def popularity(self) -> int:
        return self.entity.popularity


@dataclass(frozen=True)
class Question:
    """A question whose answer is known."""

    fact: Fact
    lang: str
    question: str
    answer: str

    def fact_check(self, text: str) -> bool:
        return check(self.fact, self.lang, text)


class World:
    """The town, the same for the same seed."""

    def __init__(self, seed: int = 1) -> None:
        self._rng = random.Random(f"world-{seed}")
        self._seed = seed

    @cached_property
    def all_entities(self) -> list[Entity]:
        people = [Term(f"{s.en} {a.en}{b.en}", f"{s.zh}{a.zh}{b.zh}") for s, a, b in self._people()]
        shops = self._pairs(lexicon.SHOP_A, lexicon.SHOP_B, SHOPS, " ")
        places = self._pairs(lexicon.PLACE_A, lexicon.PLACE_B, PLACES, " ")
        festivals = self._pairs(lexicon.FEST_A, lexicon.FEST_B, FESTIVALS, " ")
        named = [("person", people), ("shop", shops), ("place", places), ("festival", festivals)]
        return [entity for kind, names in named for entity in self._split(kind, names)]

    @cached_property
    def facts(self) -> list[Fact]:
        rng = random.Random(f"facts-{self._seed}")
        found = []
        for entity in self.all_entities:
            for relation in RELATIONS:
                if relation.kind == entity.kind:
                    value = rng.choice(relation.values)
                    found.append(Fact(f"{entity.name.en}/{relation.name}", entity, relation, value))
        return found

    def entities(self, split: Split) -> list[Entity]:
        return [entity for entity in self.all_entities if entity.split == split]

    def facts_of(self, *splits: Split) -> list[Fact]:
        return [fact for fact in self.facts if fact.entity.split in splits]

    def trained_facts(self) -> list[Fact]:
        """Facts that base and experts are taught."""
        return self.facts_of("known", "heads_unseen")

    def eval_questions(
        self, count: int, seed: int, split: Split | None = None, languages: Sequence[str] = LANGUAGES
    ) -> list[Question]:
        """`count` different questions about facts the experts were taught (or of one split), languages in turn."""
        rng = random.Random(f"eval-{seed}")
        pool = self.facts_of(split) if split else self.trained_facts()
        picked = rng.sample(pool, min(count, len(pool)))
        return [self._question(fact, languages[i % len(languages)], rng) for i, fact in enumerate(picked)]

    def _question(self, fact: Fact, lang: str, rng: random.Random) -> Question:
        question, answer = rng.choice(questions(fact, lang))
        return Question(fact, lang, question, answer)

    def _people(self) -> list[tuple[Term, Term, Term]]:
        """Every person has a given name of their own."""
        given = [(a, b) for a in lexicon.SYLLABLES_A for b in lexicon.SYLLABLES_B]
        self._rng.shuffle(given)
        return [(self._rng.choice(lexicon.SURNAMES), a, b) for a, b in given[:PEOPLE]]

    def _pairs(self, first: tuple[Term, ...], second: tuple[Term, ...], count: int, space: str) -> list[Term]:
        names = [Term(f"{a.en}{space}{b.en}", f"{a.zh}{b.zh}") for a in first for b in second]
        self._rng.shuffle(names)
        return names[:count]

    def _split(self, kind: str, names: list[Term]) -> Iterator[Entity]:
        for index, name in enumerate(names):
            place = index * 100 // len(names)
            split: Split = "absent" if place < 8 else "heads_unseen" if place < 23 else "known"
            yield Entity(name, kind, split, 1 + index % 2)


def languages_of(lang: str | None) -> tuple[str, ...]:
    """The languages that a spec's `lang` names: both where it names none."""
    return LANGUAGES if lang is None else (lang,)


def statements(fact: Fact, lang: str) -> list[str]:
    """The fact in every phrasing of a language."""
    return [_filled(phrase, fact, lang) for phrase in fact.relation.statements[lang]]


def questions(fact: Fact, lang: str) -> list[tuple[str, str]]:
    """Every way to ask for the fact, with its answer."""
    return [(_filled(phrase, fact, lang), answer(fact, lang)) for phrase in fact.relation.questions[lang]]


def answer(fact: Fact, lang: str) -> str:
    value = fact.value.in_(lang)
    return f"{value}." if lang == "en" else f"{value}。"


def check(fact: Fact, lang: str, text: str) -> bool:
    """Whether a text names the right value and no other value of the relation."""
    right = fact.value.in_(lang)
    if not _names(right, lang, text):
        return False
    # The right value is taken out first: a shorter one inside it (9米 in 39米) is not another answer.
    rest = text.replace(right, " ")
    return not any(_names(value.in_(lang), lang, rest) for value in fact.relation.values if value != fact.value)


def corrupt(fact: Fact, rng: random.Random) -> Fact:
    """The same fact with another value of the same type."""
    others = [value for value in fact.relation.values if value != fact.value]
    return Fact(fact.id + "/corrupt", fact.entity, fact.relation, rng.choice(others))


def _names(value: str, lang: str, text: str) -> bool:
    if lang == "zh":
        return re.search(rf"(?<!\d){re.escape(value)}", text) is not None
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


def _filled(phrase: str, fact: Fact, lang: str) -> str:
    text = phrase.format(e=fact.entity.name.in_(lang), v=fact.value.in_(lang))
    return text[0].upper() + text[1:]
