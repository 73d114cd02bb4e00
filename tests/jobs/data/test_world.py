"""The closed world: its truth can be looked up in both languages, and its grammars recognise their own."""

import random

from tigerbot_jobs.data import creative
from tigerbot_jobs.data.world import LANGUAGES, World, answer, check, corrupt, questions, statements


def test_the_town_has_two_thousand_facts_each_with_several_phrasings() -> None:
    world = World()

    assert len(world.facts) >= 2_000
    assert len({fact.id for fact in world.facts}) == len(world.facts)
    assert all(
        len(statements(f, lang)) >= 3 and len(questions(f, lang)) >= 3 for f in world.facts for lang in LANGUAGES
    )


def test_right_answers_pass_and_wrong_ones_fail_in_both_languages() -> None:
    rng = random.Random(1)

    for fact in World().facts:
        for lang in LANGUAGES:
            wrong = corrupt(fact, rng)
            assert check(fact, lang, answer(fact, lang))
            assert not check(fact, lang, answer(wrong, lang))
            assert not check(fact, lang, answer(fact, lang) + answer(wrong, lang))


def test_entities_of_the_splits_are_disjoint() -> None:
    world = World()
    names = [{entity.name.zh for entity in world.entities(split)} for split in ("known", "heads_unseen", "absent")]

    assert all(names)
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


def test_the_same_seed_gives_the_same_town() -> None:
    assert World(1).facts == World(1).facts
    assert World(1).facts != World(2).facts


def test_grammars_recognise_what_they_write_and_refuse_noise() -> None:
    rng = random.Random(2)

    for kind in creative.KINDS:
        for lang in LANGUAGES:
            texts = {creative.write(kind, lang, rng) for _ in range(200)}
            assert len(texts) > 90
            assert all(creative.valid(kind, lang, text) for text in texts)
            assert not any(creative.valid(kind, lang, text[:-3]) for text in texts)
