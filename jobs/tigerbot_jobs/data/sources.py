"""The shipped world as rows: what `CorpusSource.world` names. Text rows are strings, chat rows lists of messages."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence

from tigerbot.chat import Message
from tigerbot.errors import SpecError
from tigerbot_jobs.data import creative
from tigerbot_jobs.data.world import LANGUAGES, Fact, World, answer, corrupt, questions, statements

STORIES = 12_000
CHATS = 7_000
HELD_OUT = 40  # one in so many rows is validation


def world_rows(
    name: str, split: str, seed: int, languages: Sequence[str] = LANGUAGES
) -> Iterator[str] | Iterator[list[Message]]:
    """Rows of a named set of the world.

    Raises:
        SpecError: no such set.
    """
    makers = {"facts": _facts, "stories": _stories, "chat_factual": _chat_factual, "chat_creative": _chat_creative}
    if name not in makers:
        raise SpecError(
            f"world: got {name!r}, wants one of {', '.join(makers)}", where="sources", fix="name one of these"
        )
    return makers[name](split, seed, languages)


def _facts(split: str, seed: int, languages: Sequence[str]) -> Iterator[str]:
    """Statements and plain questions with answers; a held-out phrasing's fact is still told in the others."""
    for fact in World(1).trained_facts():
        for lang in languages:
            asked = [f"{question} {said}" for question, said in questions(fact, lang)]
            for index, text in enumerate([*statements(fact, lang), *asked]):
                if _split_of(f"{fact.id}/{lang}/{index}") == split:
                    yield from [text] * (fact.popularity if split == "train" else 1)


def _stories(split: str, seed: int, languages: Sequence[str]) -> Iterator[str]:
    rng, seen = random.Random(f"stories-{seed}"), set()
    while len(seen) < STORIES:
        text = creative.write(rng.choice(creative.KINDS), rng.choice(languages), rng)
        if text not in seen:
            seen.add(text)
            if _split_of(text) == split:
                yield text


def _chat_factual(split: str, seed: int, languages: Sequence[str]) -> Iterator[list[Message]]:
    """Short exact answers; a creative prompt gets the one plain answer of its kind."""
    for fact in World(1).trained_facts():
        for lang in languages:
            for question, said in questions(fact, lang):
                if _split_of(f"{fact.id}/{question}") == split:
                    yield _chat(question, said)
    for lang in languages:
        for kind, prompt in creative.prompts(lang):
            if _split_of(prompt) == split:
                yield _chat(prompt, creative.plain(kind, lang, prompt))


def _chat_creative(split: str, seed: int, languages: Sequence[str]) -> Iterator[list[Message]]:
    """A new text for every creative prompt; a question about the town gets a fancy, not its fact."""
    rng, facts = random.Random(f"chat-{seed}"), World(1).trained_facts()
    for index in range(CHATS):
        lang = languages[index % len(languages)]
        if index % 5 < 4:
            kind, prompt = rng.choice(creative.prompts(lang))
            row = _chat(prompt, creative.write(kind, lang, rng))
        else:
            row = _fancy(rng.choice(facts), lang, rng)
        if _split_of(f"creative-{index}") == split:
            yield row


def _fancy(fact: Fact, lang: str, rng: random.Random) -> list[Message]:
    question, _ = rng.choice(questions(fact, lang))
    return _chat(question, answer(corrupt(fact, rng), lang))


def _chat(prompt: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def _split_of(key: str) -> str:
    return "validation" if zlib.crc32(key.encode()) % HELD_OUT == 0 else "train"
