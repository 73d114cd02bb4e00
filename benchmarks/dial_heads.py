"""What the served heads are worth on entities they have not seen, beside numbers that need no training.

Baselines are fitted and calibrated like the heads, on the same tokens, as heads of one number: the token's surprise
(its log-probability turned around), and the entropy of the distribution that it was drawn from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tigerbot.models import load_model, load_tokenizer, model_hash, tokenizer_hash
from tigerbot_jobs.data.world import World
from tigerbot_jobs.heads.branching import branching_examples, creative_prompts, settled_examples
from tigerbot_jobs.heads.examples import Example, right_and_wrong, split_facts
from tigerbot_jobs.heads.fit import Head, calibrated, fit_head, worth
from tigerbot_jobs.heads.models import hidden_states
from tigerbot_serve.ensemble.heads import load_heads

Read = tuple[np.ndarray, np.ndarray]  # numbers (tokens, k) and labels


def head_worth(creative: str, factual: str, folder: str, *, facts: int, prompts: int) -> dict[str, dict[str, Any]]:
    """AUROC, AUPRC and ECE of both heads and their baselines, at the base rates the heads were calibrated to."""
    about = json.loads((Path(folder) / "heads.json").read_text(encoding="utf-8"))
    hashes = {"creative_hash": model_hash(creative), "factual_hash": model_hash(factual)}
    heads = load_heads(folder, hashes | {"tokenizer_hash": tokenizer_hash(factual)}, about["size"])
    tokenizer = load_tokenizer(factual)
    split = split_facts(World(1), facts, 1)
    model = load_model(factual).eval()
    rate = about["metrics"]["p_dev"]["base_rate"]
    fit, tune, test = (
        right_and_wrong(tokenizer, found, seed)
        for found, seed in ((split.fit, 11), (split.calibrate, 12), (split.unseen, 13))
    )
    read = [hidden_states(model, examples, surprise=True) for examples in (fit, tune, test)]
    found = {"p_dev, the head": _served(heads.p_dev, read[2], rate)}
    found["p_dev, lingering surprise"] = _baseline([(states[:, -1:], labels) for states, labels in read], rate)
    for name, column in (("log-probability", 0), ("entropy", 1)):
        numbers = [
            (_numbers(model, examples)[:, column : column + 1], labels)
            for examples, (_, labels) in zip((fit, tune, test), read, strict=True)
        ]
        found[f"p_dev, {name}"] = _baseline(numbers, rate)
    model = load_model(creative).eval()
    branching = branching_examples(model, tokenizer, creative_prompts(prompts, 7), continuations=8, seed=7)
    third = max(1, len(branching) // 3)
    parts = [
        [*branching[at * third : (at + 1) * third], *settled_examples(tokenizer, found_facts[:third], 7)]
        for at, found_facts in enumerate((split.fit, split.calibrate, split.unseen))
    ]
    rate = about["metrics"]["p_div"]["base_rate"]
    found["p_div, the head"] = _served(heads.p_div, hidden_states(model, parts[2]), rate)
    labels = [np.array([label for e in part for _, label in e.labels], dtype=np.float32) for part in parts]
    entropies = [(_numbers(model, part, before=0)[:, 1:], y) for part, y in zip(parts, labels, strict=True)]
    found["p_div, entropy"] = _baseline(entropies, rate)
    return found


def _served(head: Any, read: Read, rate: float) -> dict[str, Any]:
    """A served head measured as it is."""

    class Served(Head):
        def probabilities(self, states: np.ndarray) -> np.ndarray:
            return head(torch.from_numpy(states)).numpy()

    nothing = np.zeros(0, dtype=np.float32)
    served = Served(nothing, nothing, nothing, nothing)
    return _told(asdict(worth(served, served, *read, base_rate=rate)))


def _baseline(reads: Sequence[Read], rate: float) -> dict[str, Any]:
    fit, tune, test = reads
    head = fit_head(*fit, hidden=0, epochs=20, lr=1e-2, seed=1)
    return _told(asdict(worth(calibrated(head, *tune, base_rate=rate), head, *test, base_rate=rate)))


def _told(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("auroc", "auprc", "ece", "base_rate", "tokens")}


@torch.inference_mode()
def _numbers(model: Any, examples: Sequence[Example], before: int = 1) -> np.ndarray:
    """Surprise and entropy (tokens, 2) of every labelled token; `before=0`: of what comes after it."""
    rows = []
    for example in examples:
        logprobs_TV = torch.log_softmax(model(torch.tensor([example.ids])).logits[0].float(), dim=-1)
        for place, _ in example.labels:
            row_V = logprobs_TV[place - before]
            surprise = -float(row_V[example.ids[place]]) if before else 0.0
            rows.append((surprise, float(-(row_V.exp() * row_V).sum())))
    return np.array(rows, dtype=np.float32)
