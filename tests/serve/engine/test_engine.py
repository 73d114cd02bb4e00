"""The engine as its callers see it: seeds, stops, cancellation, limits, failures."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.errors import InputError, ServeError
from tigerbot_serve.engine.request import FinishEvent, Request
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.engine.sequence import TextStream


def prompt(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


def settled(engine) -> None:
    until = time.monotonic() + 10
    while engine.stats().slots_used or engine.stats().queued:
        assert time.monotonic() < until, "a slot leaked"
        time.sleep(0.005)


@pytest.mark.parametrize("dial", [0.0, 0.4, 1.0])
def test_a_seed_is_a_text_whatever_else_is_decoded(engine_of, ask, tokenizer, dial) -> None:
    engine = engine_of("lora", engine={"slots": 6, "max_length": 128}, dial={"plausibility": 0.0})
    mine = Request(prompt(tokenizer, "狐狸在河"), 24, dial, temperature=2.0, seed=11)
    others = [
        Request(prompt(tokenizer, "Rain falls on the old town"), 5 + 4 * i, 0.2 * i, temperature=0.8, seed=i)
        for i in range(5)
    ]

    alone = ask(engine, mine)[0]
    crowded = ask(engine, *others[:3], mine, *others[3:])[3]

    assert crowded.ids == alone.ids and len(alone.ids) > 3
    assert ask(engine, Request(mine.prompt_ids, 24, dial, temperature=2.0, seed=12))[0].ids != alone.ids


def test_a_long_prompt_in_chunks_gives_what_it_gives_at_once(engine_of, ask, tokenizer) -> None:
    long = prompt(tokenizer, "The fox sings in the river at night. 狐狸在河边唱歌。" * 4)[:90]
    request = Request(long, 10, 0.5, temperature=0.0)

    chunked, whole = (
        ask(engine_of("lora", engine={"max_length": 128, "prefill_chunk": chunk}), request)[0] for chunk in (7, 256)
    )

    assert chunked.ids == whole.ids


def test_every_member_kind_agrees_on_the_mixture(engine_of, ask, tokenizer) -> None:
    request = Request(prompt(tokenizer, "月亮 the moon"), 16, 0.5, temperature=0.0)

    paired, two_models = (ask(engine_of(kind), request)[0] for kind in ("lora", "full"))

    assert paired.ids == two_models.ids
    for ours, theirs in zip(paired.tokens, two_models.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_cancelled_request_frees_its_slot_within_a_step(engine_of, tokenizer) -> None:
    engine = engine_of("lora", engine={"slots": 1, "max_length": 900})
    step, waiting = engine.stepper.step, []

    async def story() -> FinishEvent:
        loop = asyncio.get_running_loop()
        first = engine.submit(Request(prompt(tokenizer, "The fox"), 800, 0.5, temperature=1.5, seed=1), loop)
        second = engine.submit(Request(prompt(tokenizer, "狐狸"), 3, 0.5, seed=1), loop)

        def watched() -> None:
            knew = first.cancelled
            step()
            if knew:
                waiting.append(engine.stats().queued)

        engine.stepper.step = watched
        await anext(first)
        first.cancel()
        async for event in second:
            if isinstance(event, FinishEvent):
                return event
        raise AssertionError

    end = asyncio.run(asyncio.wait_for(story(), 60))

    assert end.finish_reason in ("length", "stop")
    assert waiting[0] == 0  # the first step that began after it gave its slot to the next one
    settled(engine)


def test_a_full_queue_refuses_and_a_wrong_prompt_is_named(engine_of, tokenizer) -> None:
    engine = engine_of("lora", engine={"slots": 1, "max_queue": 1, "max_length": 128})

    async def story() -> None:
        loop = asyncio.get_running_loop()
        request = Request(prompt(tokenizer, "The fox"), 100, 0.5, temperature=1.0)
        with pytest.raises(QueueFull):
            for _ in range(4):
                engine.submit(request, loop)
        for ids in ((), (10**6,), tuple(range(80, 80 + 128))):
            with pytest.raises(InputError):
                engine.submit(Request(ids, 1, 0.5), loop)

    asyncio.run(story())
    settled(engine)


def test_a_step_that_fails_ends_its_requests_and_the_engine_lives_on(engine_of, ask, tokenizer, monkeypatch) -> None:
    engine = engine_of("lora")
    request = Request(prompt(tokenizer, "The fox"), 8, 0.5, temperature=0.0)
    good = ask(engine, request)[0]
    real, calls = engine.mixture.next, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")
        return real(*args)

    monkeypatch.setattr(engine.mixture, "next", breaks)
    broken, after = ask(engine, request)[0], ask(engine, request)[0]

    assert broken.end.finish_reason == "error" and "out of memory" in broken.end.error
    assert after.ids == good.ids and engine.alive
    settled(engine)


def test_a_stopped_engine_ends_what_runs_and_takes_nothing_more(engine_of, tokenizer) -> None:
    engine = engine_of("lora", engine={"max_length": 900})

    async def story() -> FinishEvent:
        loop = asyncio.get_running_loop()
        handle = engine.submit(Request(prompt(tokenizer, "The fox"), 800, 0.5, temperature=1.5), loop)
        await anext(handle)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ServeError, match="is not running"):
            engine.submit(Request(prompt(tokenizer, "x"), 1, 0.5), loop)
        events = [event async for event in handle]
        return events[-1]

    assert asyncio.run(asyncio.wait_for(story(), 30)).finish_reason == "error"
    assert not engine.alive


@pytest.mark.parametrize("text", ["狐狸在河边唱歌。🦊月亮", "The fox — naïve café", "混合 mixed 文本 🐉"])
def test_streamed_characters_are_never_cut_in_half(tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)

    pieces = [stream.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]

    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="狐狸歌 abcfox.", min_size=1, max_size=30), start=st.integers(0, 29), size=st.integers(1, 6)
)
def test_a_stop_text_is_found_across_token_borders_and_not_given(tokenizer, text: str, start: int, size: int) -> None:
    stop = text[start % len(text) :][:size]
    stream = TextStream(tokenizer, [stop])
    given_text = ""
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(ids)
    for token in ids:
        given_text += stream.push(token)
        if stream.stopped:
            break
    else:
        given_text += stream.flush()

    assert given_text == (decoded[: decoded.index(stop)] if stop in decoded else decoded)
