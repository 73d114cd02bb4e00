"""`kind: heads`: label text of the closed world, read both experts' hidden states there, fit, calibrate, measure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from tigerbot.chat import end_token_ids
from tigerbot.errors import ModelError
from tigerbot.int8 import quantise
from tigerbot.models import load_model, load_tokenizer, model_hash, tokenizer_hash
from tigerbot.progress import Stage, stage
from tigerbot.runs import Run
from tigerbot.spec import HeadsSpec
from tigerbot.tracking import TrackedRun, tracked
from tigerbot_jobs.data.world import Fact, World, check, languages_of, questions
from tigerbot_jobs.heads.branching import branching_examples, creative_prompts, prompt_ids, settled_examples
from tigerbot_jobs.heads.examples import (
    Example,
    Facts,
    before_the_answer,
    fanciful,
    right_and_wrong,
    split_facts,
    unknown,
)
from tigerbot_jobs.heads.fit import Head, Worth, calibrated, fit_head, worth
from tigerbot_jobs.heads.models import continued, hidden_states

FORMAT_VERSION = 2
STEPS = 5
_ANSWER_TOKENS = 12


def run(run: Run) -> dict[str, Any]:
    """Write `heads/heads.safetensors` and `heads/heads.json` into the run's folder."""
    spec = run.spec
    assert isinstance(spec, HeadsSpec)
    for folder in (spec.creative, spec.factual):
        if not Path(folder).is_dir():
            raise ModelError("there is no such folder", where=folder, fix="train the experts first")
    if tokenizer_hash(spec.creative) != tokenizer_hash(spec.factual):
        raise ModelError("the experts have different tokenizers", where=spec.creative, fix="train both on one corpus")
    torch.set_num_threads(os.cpu_count() or 1)
    with tracked(run) as (_, its_run), stage("fitting the heads", total=STEPS, unit="steps") as shown:
        result = _fit(run, spec, its_run, shown)
    return run.finish(result)


def _fit(run: Run, spec: HeadsSpec, tracked: TrackedRun, shown: Stage) -> dict[str, Any]:
    tokenizer = load_tokenizer(spec.factual)
    facts = split_facts(World(1), spec.facts, spec.seed)
    factual = _expert(spec.factual, spec)
    shown.update(1, "p_dev: reading the factual expert")
    p_dev, dev_worth, known = _deviation(factual, tokenizer, facts, spec)
    shown.update(2, "p_div: branching points of the creative expert")
    del factual
    creative = _expert(spec.creative, spec)
    p_div, div_worth = _divergence(creative, tokenizer, facts, spec)
    shown.update(4, "writing")
    metrics = {"p_dev": asdict(dev_worth), "p_div": asdict(div_worth), "unknown": known}
    _write(run.folder / "heads", {"p_div": p_div, "p_dev": p_dev}, spec, metrics)
    shown.update(STEPS)
    for name, found in (("p_dev", dev_worth), ("p_div", div_worth)):
        numbers = {f"{name}_{key}": float(value) for key, value in asdict(found).items()}
        tracked.log(
            numbers | ({f"unknown_{k}": v for k, v in known.items()} if name == "p_dev" else {}), step=len(name)
        )
        print(
            f"  {name}: AUROC {found.auroc:.3f} (placebo {found.placebo_auroc:.3f}), AUPRC {found.auprc:.3f} at base "
            f"rate {found.base_rate:.3f}, ECE {found.ece:.3f}, {found.tokens} tokens of unseen entities"
        )
    print(f"  what nobody told it: p_dev {known['p_dev_absent']:.2f}, of what it knows {known['p_dev_known']:.2f}")
    return {"heads": str((run.folder / "heads").absolute()), "metrics": metrics}


def _expert(folder: str, spec: HeadsSpec) -> Any:
    """An expert as it will be served: int8 has the base's linears in int8, adapters on top stay float32."""
    model = load_model(folder).eval()
    return quantise(model) if spec.dtype == "int8" else model


def _deviation(model: Any, tokenizer: Any, facts: Facts, spec: HeadsSpec) -> tuple[Head, Worth, dict[str, float]]:
    """p_dev, its worth on unseen entities, and what it says of answers about absent ones."""
    ends, seed, languages = end_token_ids(tokenizer), spec.seed, languages_of(spec.lang)
    guesses = _guesses(model, tokenizer, facts.invented, ends, seed, languages)
    free = fanciful(tokenizer, len(facts.fit) // 2, seed, languages)
    told = right_and_wrong(tokenizer, facts.fit, seed, languages)
    wrong, right = [e for e in told if _any_wrong(e)], [e for e in told if not _any_wrong(e)]
    fit = _read(model, [*wrong, *map(before_the_answer, (*right, *guesses, *free))])
    # Guesses are not calibrated on: the base rate is of errors about what the expert was taught.
    tuning = _read(model, right_and_wrong(tokenizer, facts.calibrate, seed + 1, languages))
    tests = right_and_wrong(tokenizer, facts.unseen, seed + 2, languages)
    unseen = _read(model, tests)
    rate = _error_rate(model, tokenizer, facts.unseen, ends, seed, languages)
    head, placebo = _pair(fit, spec)
    head = calibrated(head, *tuning, base_rate=rate)
    absent = _read(model, _guesses(model, tokenizer, facts.absent, ends, seed, languages))
    true = _read(model, [example for example in tests if not _any_wrong(example)])
    known = {
        "p_dev_absent": float(head.probabilities(absent[0]).mean()),
        "p_dev_known": float(head.probabilities(true[0]).mean()),
        "auroc": _auroc(head, true[0], absent[0]),
    }
    return head, worth(head, placebo, *unseen, base_rate=rate), known


def _read(model: Any, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    return hidden_states(model, examples, surprise=True)


def _divergence(model: Any, tokenizer: Any, facts: Facts, spec: HeadsSpec) -> tuple[Head, Worth]:
    """p_div, and its worth on prompts and entities it has not seen."""
    languages = languages_of(spec.lang)
    prompts = creative_prompts(spec.branch_prompts * 2, spec.seed, languages)
    branching = branching_examples(model, tokenizer, prompts, continuations=spec.continuations, seed=spec.seed)
    cut, tune = int(0.6 * len(branching)), int(0.8 * len(branching))
    settled = [
        settled_examples(tokenizer, found, spec.seed, languages) for found in (facts.fit, facts.calibrate, facts.unseen)
    ]
    counts = (cut, tune - cut, len(branching) - tune)
    parts = [branching[:cut], branching[cut:tune], branching[tune:]]
    fit, tuning, unseen = (
        hidden_states(model, [*part, *quiet[:count]]) for part, quiet, count in zip(parts, settled, counts, strict=True)
    )
    head, placebo = _pair(fit, spec)
    rate = float(fit[1].mean())
    head = calibrated(head, *tuning, base_rate=rate)
    return head, worth(head, placebo, *unseen, base_rate=rate)


def _pair(fit: tuple[np.ndarray, np.ndarray], spec: HeadsSpec) -> tuple[Head, Head]:
    """The head, and one fitted on shuffled labels."""
    settings = {"hidden": spec.hidden, "epochs": spec.epochs, "lr": spec.lr, "seed": spec.seed}
    return fit_head(*fit, **settings), fit_head(*fit, **settings, placebo=True)


def _answers(
    model: Any, tokenizer: Any, facts: list[Fact], ends: list[int], seed: int, languages: Sequence[str]
) -> list[tuple[Fact, str, str, str]]:
    """(fact, language, question, the model's own greedy answer)."""
    asked = [(fact, lang, questions(fact, lang)[seed % 2][0]) for fact in facts for lang in languages]
    prompts = [prompt_ids(tokenizer, question) for _, _, question in asked]
    said = continued(model, prompts, _ANSWER_TOKENS, ends=ends, temperature=0.0, seed=seed)
    return [(*one, tokenizer.decode(ids)) for one, ids in zip(asked, said, strict=True)]


def _guesses(
    model: Any, tokenizer: Any, facts: list[Fact], ends: list[int], seed: int, languages: Sequence[str]
) -> list[Example]:
    found = _answers(model, tokenizer, facts, ends, seed, languages)
    return [unknown(tokenizer, question, text) for _, _, question, text in found if text.strip()]


def _error_rate(
    model: Any, tokenizer: Any, facts: list[Fact], ends: list[int], seed: int, languages: Sequence[str]
) -> float:
    """How often the model's own greedy answers are wrong: the base rate of p_dev, kept off 0 and 1."""
    said = _answers(model, tokenizer, facts, ends, seed, languages)
    wrong = sum(not check(fact, lang, text) for fact, lang, _, text in said)
    return float(np.clip(wrong / len(said), 0.02, 0.98))


def _any_wrong(example: Example) -> bool:
    return any(label for _, label in example.labels)


def _auroc(head: Head, negative: np.ndarray, positive: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([head.probabilities(negative), head.probabilities(positive)])
    return float(roc_auc_score([0] * len(negative) + [1] * len(positive), scores))


def _write(folder: Path, heads: dict[str, Head], spec: HeadsSpec, metrics: dict[str, Any]) -> None:
    """The heads' folder; it appears whole, by rename."""
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    tensors = {}
    for name, head in heads.items():
        parts = {"w1": head.w1, "b1": head.b1} if spec.hidden else {}
        for part, array in (parts | {"w2": head.w2, "b2": head.b2}).items():
            tensors[f"{name}.{part}"] = np.ascontiguousarray(array)
    save_file(tensors, str(staged / "heads.safetensors"))
    about = {
        "format_version": FORMAT_VERSION,
        "layer": -1,
        "hidden": spec.hidden,
        "size": heads["p_div"].width,
        **{name: {"temperature": head.temperature, "bias": head.bias} for name, head in heads.items()},
        "creative_hash": model_hash(spec.creative),
        "factual_hash": model_hash(spec.factual),
        "tokenizer_hash": tokenizer_hash(spec.factual),
        "quantisation": "int8" if spec.dtype == "int8" else "none",
        "metrics": metrics,
    }
    (staged / "heads.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
