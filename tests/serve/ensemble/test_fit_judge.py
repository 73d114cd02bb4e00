"""The judge's threshold is fitted on validation questions, and judging costs nothing where decoding has read it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tigerbot.errors import InputError
from tigerbot_serve.engine.request import Request
from tigerbot_serve.ensemble.fit_judge import Draft, main, threshold_for, told

RANDOM_HEAD = torch.randn(257, generator=torch.Generator().manual_seed(4)) * 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_no_more_than_the_share_is_doubted_and_a_lower_threshold_would_doubt_more(doubts, share) -> None:
    threshold = threshold_for(doubts, share)

    assert sum(doubt > threshold for doubt in doubts) <= share * len(doubts)
    if threshold > 0:
        assert sum(doubt >= threshold for doubt in doubts) > share * len(doubts) - 1


def test_the_block_says_what_it_costs_and_what_it_catches() -> None:
    found = [Draft(0.9, False), Draft(0.6, False), Draft(0.5, True), Draft(0.1, True)]

    assert told(found, 0.5).splitlines() == [
        "# 4 drafts, 50% wrong; 50% are doubted:",
        "# 100% of the wrong ones, 0% of the right ones",
        "judge: {threshold: 0.5}",
    ]


def test_a_spec_and_questions_give_a_threshold(world, heads, tmp_path: Path, capsys) -> None:
    raw = {
        "kind": "serve",
        "name": "s",
        "members": world.members("lora"),
        "heads": str(heads(w_dev=RANDOM_HEAD)),
        "engine": {"max_length": 128},
        "scale": {"threads": 1},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(raw))
    rows = [{"prompt": f"fox {number} 狐狸", "accept": ["a"]} for number in range(8)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    main(str(tmp_path / "serve.yaml"), str(tmp_path / "questions.jsonl"), 0.25)

    block = yaml.safe_load(capsys.readouterr().out)
    assert 0 < block["judge"]["threshold"] < 1
    with pytest.raises(InputError, match="a share between 0 and 1"):
        main(str(tmp_path / "serve.yaml"), str(tmp_path / "questions.jsonl"), 1.5)


@pytest.mark.parametrize("mode", [{}, {"speculate": {"tokens": 3}}])
def test_what_decoding_has_read_is_what_a_reading_says(engine_of, heads, ask, tokenizer, monkeypatch, mode) -> None:
    engine = engine_of("lora", heads=str(heads(w_dev=RANDOM_HEAD)), engine={"max_length": 128} | mode)
    prompt = tuple(tokenizer.encode("The fox 狐狸"))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    requests = [
        Request(prompt, 40, dial, 1.0, seed=seed, verify=True, max_rewrites=0, logit_bias=((end, 8.0),))
        for dial in (0.0, 0.3, 0.6)
        for seed in range(3)
    ]
    heard = ask(engine, *requests)
    monkeypatch.setattr(engine.stepper._review._judge, "heard", lambda attempt: None)

    read = ask(engine, *requests)

    whole = [at for at, answer in enumerate(heard) if answer.end.finish_reason == "stop" and len(answer.ids) > 1]
    assert whole, "no answer ended by itself"
    for at in whole:
        assert heard[at].ids == read[at].ids
        assert heard[at].end.usage.judge_tokens == 0 < read[at].end.usage.judge_tokens
        ours, theirs = ([token.p_dev for token in one.tokens[:-1]] for one in (heard[at], read[at]))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert heard[at].end.summary.verdict == read[at].end.summary.verdict
