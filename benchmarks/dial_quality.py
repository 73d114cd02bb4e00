"""What the dial, the heads and the rewrites are worth on the closed world, in one command.

    DEMO=tiger-runs/demo python -m benchmarks dial_quality             # about ten minutes on two idle cores
    DEMO=tiger-runs/demo SIZE=small python -m benchmarks dial_quality  # a look, no claims

`DEMO` is the folder of a finished `tiger demo`: members, heads. Accuracy is of questions about facts that the factual
expert was taught, diversity is distinct valid answers to creative prompts. Every rule (`dial_rules.py`) has the same
number of points. Writes `dial_quality.json` and `dial_quality.md` into `OUT` (default: benchmarks/).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.dial_front import Front, Span, compared, correlation, measured
from benchmarks.dial_heads import head_worth
from benchmarks.dial_rewrites import fitted_threshold, rewrites
from benchmarks.dial_rules import contenders
from benchmarks.harness import Row, machine
from tigerbot.errors import InputError
from tigerbot.spec import DialSpec
from tigerbot_jobs.data.world import World
from tigerbot_jobs.evaluate.job import creative_prompts
from tigerbot_serve.ensemble.offline import Pair

THREADS = 2


@dataclass(frozen=True)
class Size:
    questions: int
    prompts: int
    samples: int
    seeds: tuple[int, ...]
    facts: int
    branching: int
    rewritten: int
    fitted: int


SIZES = {
    "full": Size(200, 16, 8, (1, 2, 3), 300, 60, 300, 150),
    "small": Size(24, 4, 4, (1,), 30, 12, 24, 30),
}


def main() -> list[Row]:
    torch.set_num_threads(THREADS)
    name = os.environ.get("SIZE", "full")
    if name not in SIZES:
        raise InputError(f"got {name!r}, wants one of {', '.join(SIZES)}", where="SIZE", fix="name one of these")
    demo, out = Path(os.environ.get("DEMO", "tiger-runs/demo")), Path(os.environ.get("OUT", "benchmarks"))
    if not (demo / "heads" / "heads").is_dir():
        raise InputError("holds no finished demo", where=f"DEMO={demo}", fix="run `make demo`, or name its folder")
    report = measure(demo, SIZES[name], _dial(demo))
    report |= {"size": name, "machine": machine()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "dial_quality.json").write_text(json.dumps(report, indent=1, default=_plain), encoding="utf-8")
    (out / "dial_quality.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report), flush=True)
    return _rows(report, SIZES[name])


def measure(demo: Path, size: Size, dial: DialSpec) -> dict[str, Any]:
    """Everything, as plain data."""
    creative, factual, heads = (str(demo / part) for part in ("creative/model", "factual/model", "heads/heads"))
    pair = Pair(creative, factual, heads)
    questions = World(1).eval_questions(size.questions, seed=1)
    fronts: list[Front] = []
    for contender in contenders(dial):
        began = time.monotonic()
        front = measured(
            contender,
            pair,
            questions,
            creative_prompts(size.prompts),
            seeds=size.seeds,
            samples=size.samples,
        )
        fronts.append(front)
        print(f"  {front.name}: hypervolume {front.volume():.3f} ({time.monotonic() - began:.0f} s)", flush=True)
    ours, others = fronts[0], fronts[1:]
    alone = max((one for one in others if one.name.startswith("temperature")), key=Front.volume)
    del pair
    raw: dict[str, Any] = {
        "kind": "serve",
        "name": "quality",
        "members": {"base": str(demo / "base/model"), "creative": creative, "factual": factual},
        "heads": heads,
        "dial": dial.model_dump(),
        "judge": {"evidence": "pull"},
        "scale": {"threads": THREADS},
    }
    asked = World(1).eval_questions(size.rewritten, seed=2)
    raw["judge"]["threshold"] = threshold = fitted_threshold(raw, asked, size.fitted, dial=dial.default)
    with tempfile.TemporaryDirectory() as folder:
        rewritten = rewrites(raw, asked, Path(folder), dial=dial.default)
    return {
        "dial": dial.model_dump(),
        "fronts": {one.name: {"hypervolume": one.volume(), "points": one.points} for one in fronts},
        "against": {one.name: compared(ours, one) for one in others},
        "best_single": alone.name,
        "spearman": {what: correlation(ours, what) for what in ("accuracy", "diversity")},
        "heads": head_worth(creative, factual, heads, facts=size.facts, prompts=size.branching),
        "threshold": threshold,
        "rewrites": rewritten,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as short tables; what the heads do not earn is said."""
    lines = [
        "| rule | hypervolume | the dial / it, 95% interval | points: setting (accuracy, diversity) |",
        "| --- " * 4 + "|",
    ]
    for name, front in report["fronts"].items():
        points = ", ".join(f"{s:g} ({a:.2f}, {d:.2f})" for s, a, d in front["points"])
        against = report["against"].get(name, "")
        lines.append(f"| {name} | {front['hypervolume']:.3f} | {against} | {points} |")
    fixed = report["against"]["fixed w (a = b = 0)"]
    earned = (
        "The heads add to fixed w."
        if fixed.low > 1
        else "The heads add nothing over fixed w that can be told from chance."
    )
    lines += ["", f"Best single model: {report['best_single']}. {earned}"]
    lines.append(
        f"Spearman of the dial with accuracy {report['spearman']['accuracy']}, with diversity {report['spearman']['diversity']}."
    )
    lines += ["", "| number at a token | AUROC | AUPRC | ECE | base rate | tokens |", "| --- " * 6 + "|"]
    for name, one in report["heads"].items():
        lines.append(
            f"| {name} | {one['auroc']:.3f} | {one['auprc']:.3f} | {one['ece']:.3f} | {one['base_rate']:.2f} | {one['tokens']} |"
        )
    lines += [
        "",
        "| way | errors | errors / draft's | harm | rewritten | mean, p95 latency / draft's mean | tokens |",
        "| --- " * 7 + "|",
    ]
    for name, one in report["rewrites"].items():
        ratio, errors = one["errors_ratio"], one["errors"]
        lines.append(
            f"| {name} | {errors['mean']:.3f} [{errors['low']:.3f}, {errors['high']:.3f}] "
            f"| {ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | {one['harm']:.3f} | {one['rewritten']:.2f} "
            f"| {one['mean_latency_ratio']:.2f}, {one['p95_latency_ratio']:.2f} | {one['tokens']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _rows(report: dict[str, Any], size: Size) -> list[Row]:
    against: dict[str, Span] = report["against"]
    best, fixed = against[report["best_single"]], against["fixed w (a = b = 0)"]
    rounds, note = len(size.seeds), f"{size.questions} questions, closed world"
    rows = [
        Row(
            "dial's hypervolume / temperature on the best single model",
            *vars(best).values(),
            "higher",
            ">= 1.15",
            rounds,
            note=note,
        ),
        Row("dial's hypervolume / fixed w", *vars(fixed).values(), "higher", "report", rounds, note=note),
    ]
    for what, target, better in (("accuracy", "<= -0.9", "lower"), ("diversity", ">= 0.9", "higher")):
        rows.append(
            Row(
                f"Spearman of the dial with {what}",
                *vars(report["spearman"][what]).values(),
                better,
                target,
                rounds,
                note=note,
            )
        )
    for way in ("rewrite", "rewrite with evidence", "best of 2"):
        one = report["rewrites"][way]
        told = (
            f"harm {one['harm']:.3f}, latency mean {one['mean_latency_ratio']:.2f}x p95 {one['p95_latency_ratio']:.2f}x"
        )
        rows.append(
            Row(f"errors after: {way}, / draft's", *one["errors_ratio"].values(), "lower", "<= 0.6", 1, note=told)
        )
    for name in ("p_dev, the head", "p_div, the head"):
        one = report["heads"][name]
        rows.append(
            Row(
                f"AUROC, {name}",
                one["auroc"],
                one["auroc"],
                one["auroc"],
                "higher",
                ">= 0.85",
                1,
                note=f"ECE {one['ece']:.3f}",
            )
        )
    return rows


def _dial(demo: Path) -> DialSpec:
    """The dial that `tiger run jobs/fit_dial.yaml` fitted, where its result was put into `dial.json`; else the default."""
    fitted = demo / "dial.json"
    return DialSpec(**json.loads(fitted.read_text(encoding="utf-8"))) if fitted.is_file() else DialSpec()


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Span) else str(value)
