"""Heads: labels that are aligned, fits that are honest, a folder that says what it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tigerbot.errors import ModelError
from tigerbot.models import build, load_tokenizer, model_hash, save_model, tokenizer_hash
from tigerbot.runner import run_spec
from tigerbot.spec import parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_jobs.data.world import LANGUAGES, World, corrupt, questions, statements
from tigerbot_jobs.heads.branching import differing
from tigerbot_jobs.heads.examples import invented_facts, split_facts, told
from tigerbot_jobs.heads.fit import calibrated, fit_head, worth

WORLD = World(1)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small random models with one bilingual tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    texts = [text for fact in WORLD.facts[:400] for lang in LANGUAGES for text in statements(fact, lang)]
    train_tokenizer(texts, 800, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for index, name in enumerate(("creative", "factual")):
        save_model(build("tiny", len(tokenizer), index), tokenizer, folder / name)
    return folder


@pytest.mark.parametrize("lang", LANGUAGES)
def test_labels_begin_at_the_first_token_that_leaves_the_fact(experts: Path, lang: str) -> None:
    import random

    tokenizer = load_tokenizer(experts / "tokenizer")
    rng = random.Random(1)
    for fact in rng.sample(WORLD.facts, 40):
        question, _ = questions(fact, lang)[0]
        false = corrupt(fact, rng)
        right, wrong = (told(tokenizer, fact, lang, question, said=said) for said in (fact, false))

        assert {label for _, label in right.labels} == {0.0}
        flags = [label for _, label in wrong.labels]
        assert flags == sorted(flags) and flags[-1] == 1.0
        place = next(place for place, label in wrong.labels if label)
        assert wrong.ids[:place] == right.ids[:place]
        labelled = tokenizer.decode([wrong.ids[p] for p, _ in wrong.labels])
        assert labelled.strip() == false.value.in_(lang)


def test_no_entity_stands_on_two_sides() -> None:
    facts = split_facts(WORLD, 400, 1)
    sides = [facts.fit, facts.calibrate, facts.unseen, facts.absent, facts.invented]

    names = [{fact.entity.name for fact in side} for side in sides]

    assert all(side for side in sides)
    for index, mine in enumerate(names):
        assert not any(mine & others for others in names[index + 1 :])
    assert not {f.entity.name for f in invented_facts(WORLD)} & {e.name for e in WORLD.all_entities}


def separable(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(count, 32)).astype(np.float32) * 3 + 5
    probability = 1 / (1 + np.exp(-(states[:, 0] - 5) * (states[:, 1] - 5) / 2))
    return states, (rng.random(count) < probability).astype(np.float32)


@pytest.mark.parametrize("hidden", [64, 0])
def test_a_head_learns_what_is_there_and_a_placebo_learns_nothing(hidden: int) -> None:
    fit, tuning, unseen = separable(4000, 1), separable(2000, 2), separable(4000, 3)
    settings = {"hidden": hidden, "epochs": 15, "lr": 3e-3, "seed": 1}

    head = calibrated(fit_head(*fit, **settings), *tuning, base_rate=0.5)
    found = worth(head, fit_head(*fit, **settings, placebo=True), *unseen, base_rate=0.5)

    assert 0.4 < found.placebo_auroc < 0.6
    assert found.ece < 0.05
    assert found.auroc > 0.85 if hidden else found.auroc < 0.6  # a product is beyond a linear head


def test_calibration_at_a_base_rate_moves_the_mean_probability_there() -> None:
    fit, tuning = separable(4000, 1), separable(4000, 2)
    head = fit_head(*fit, hidden=32, epochs=10, lr=3e-3, seed=1)

    rare = calibrated(head, *tuning, base_rate=0.05)

    weights = np.where(tuning[1] > 0.5, 0.05 / tuning[1].mean(), 0.95 / (1 - tuning[1].mean()))
    assert np.average(rare.probabilities(tuning[0]), weights=weights) == pytest.approx(0.05, abs=0.01)


def test_two_of_four_different_continuations_differ() -> None:
    assert differing([[1], [1], [1]]) == 0.0
    assert differing([[1], [2], [3]]) == 1.0
    assert differing([[1], [1], [2], [2]]) == pytest.approx(2 / 3)


def spec_of(experts: Path, storage: Path, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "heads",
        "name": "heads",
        "creative": str(experts / "creative"),
        "factual": str(experts / "factual"),
        "facts": 12,
        "branch_prompts": 6,
        "continuations": 4,
        "epochs": 2,
        "storage": {"uri": str(storage)},
        "tracking": {"uri": f"sqlite:///{storage}/mlflow.db"},
    } | fields


def test_the_folder_names_the_models_its_heads_belong_to(experts: Path, tmp_path: Path) -> None:
    result = run_spec(parse_spec(spec_of(experts, tmp_path)))

    about = json.loads((tmp_path / "heads/heads/heads.json").read_text())
    tensors = load_file(tmp_path / "heads/heads/heads.safetensors")
    assert about["creative_hash"] == model_hash(experts / "creative")
    assert about["factual_hash"] == model_hash(experts / "factual")
    assert about["tokenizer_hash"] == tokenizer_hash(experts / "factual")
    assert tensors["p_dev.w1"].shape == (64, 257) and tensors["p_div.w1"].shape == (64, 256)
    assert tensors["p_div.w2"].shape == (1, 64)
    assert result["metrics"]["p_dev"]["tokens"] > 0 and 0 <= result["metrics"]["unknown"]["auroc"] <= 1


def test_missing_experts_are_said_in_one_line(experts: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder; train the experts first"):
        run_spec(parse_spec(spec_of(experts, tmp_path, creative="/nowhere")))
