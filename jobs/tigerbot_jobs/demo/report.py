"""What the demo ends with: the table, the checks, and one self-contained `report.html`."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.runs import write_text
from tigerbot_jobs.demo.figures import Series, chart, heat_map
from tigerbot_jobs.train.metrics import read_rows

STYLE = """
body{font:15px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fbfcfd}
h1{font-size:1.6rem} h2{margin-top:2.2rem;font-size:1.15rem} table{border-collapse:collapse;width:100%}
td,th{padding:.35rem .6rem;border-bottom:1px solid #dde3ea;text-align:left;vertical-align:top}
svg{width:100%;max-width:40rem;font-size:11px;fill:#44505c} .grid{stroke:#e6ebf0}
.token{display:inline-block;padding:2px 1px;white-space:pre} .token i{display:block;height:6px;margin-top:2px}
.ok{color:#007a5a} .bad{color:#c0392b;font-weight:600} .note{color:#66727e}
@media(prefers-color-scheme:dark){body{background:#12171c;color:#dfe6ec}svg{fill:#aab4be}.grid{stroke:#28313a}
td,th{border-color:#28313a}}
"""


@dataclass(frozen=True)
class Check:
    """A statement about the run, and whether it holds."""

    text: str
    holds: bool


def print_table(evaluation: dict[str, Any]) -> None:
    """The dial table on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{evaluation['questions']} questions x {evaluation['seeds']} seeds; answers to: {evaluation['question']}"
    )
    for column in ("dial", "answer", "accuracy [95%]", "diversity [95%]", "valid", "mean w"):
        table.add_column(column)
    for row in evaluation["rows"]:
        weight = "" if row["w_mean"] is None else f"{row['w_mean']:.2f}"
        cells = (f"{row['dial']:.2f}", row["example"], _interval(row["accuracy"]), _interval(row["diversity"]))
        table.add_row(*cells, f"{row['valid']:.2f}", weight)
    Console(width=118).print(table)


def checks(folder: Path, results: dict[str, Any], mlflow_url: str, experiment: str) -> list[Check]:
    """The statements that decide the demo's exit status."""
    evaluation = results["evaluation"]
    rows = {row["dial"]: row for row in evaluation["rows"]}
    first, last = rows[min(rows)], rows[max(rows)]
    accuracy, diversity = evaluation["accuracy_gain"], evaluation["diversity_gain"]
    if "base" not in results:  # a few minutes of LoRA teach a real model the manner, not 2,000 facts
        return [_tracked(results, mlflow_url, experiment)]
    return [
        *_base_checks(folder, results),
        Check(
            f"factual accuracy at dial 0 is {first['accuracy']['mean']:.3f}, at least 0.6",
            first["accuracy"]["mean"] >= 0.6,
        ),
        Check(
            f"accuracy at dial 0 exceeds dial 1 by {accuracy['mean']:.3f}, 95% [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
            accuracy["low"] > 0,
        ),
        Check(
            f"diversity at dial 1 exceeds dial 0 by {diversity['mean']:.3f}, "
            f"95% [{diversity['low']:.3f}, {diversity['high']:.3f}] ({last['diversity']['mean']:.3f} against "
            f"{first['diversity']['mean']:.3f})",
            diversity["low"] > 0,
        ),
        _tracked(results, mlflow_url, experiment),
    ]


def write_report(folder: Path, results: dict[str, Any], held: list[Check]) -> Path:
    """Write `report.html` into the demo's folder and return its path."""
    evaluation = results["evaluation"]
    sections = [
        "<h1>TigerBot demo</h1>",
        "<p>Raw text became tokens, a base model, two experts, two heads, and one endpoint with a dial. 从文本到带旋钮的回答。</p>",
        "<h2>Checks</h2><ul>" + "".join(_check_item(check) for check in held) + "</ul>",
        "<h2>The dial</h2>" + _dial_table(evaluation) + _front(evaluation),
        "<h2>One answer, token by token</h2>" + _shown(evaluation["shown"]),
        "<h2>Loss</h2>" + _losses(folder),
        "<h2>The sweep</h2>" + _sweep(results.get("sweep", {})),
        "<h2>The heads</h2>" + _heads(results.get("heads", {})),
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>TigerBot demo</title><style>{STYLE}</style>"
    path = folder / "report.html"
    write_text(path, page + "\n".join(sections) + "</html>\n")
    return path


def _base_checks(folder: Path, results: dict[str, Any]) -> list[Check]:
    base = results.get("base", {})
    if "bits_per_byte" not in base:
        return []
    ours, counted = base["bits_per_byte"], base["ngram_bits_per_byte"]
    return [
        Check(
            f"base: {ours:.3f} bits per byte on held-out text, below the 5-gram model's {counted:.3f}", ours < counted
        )
    ]


def _tracked(results: dict[str, Any], mlflow_url: str, experiment: str) -> Check:
    """Every stage and every trial has exactly one run in MLflow, and it ended well."""
    import mlflow

    client = mlflow.MlflowClient(mlflow_url)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=5000) if found else []
    finished = [run.info.run_name for run in runs if run.info.status == "FINISHED"]
    wanted = [name for name in ("sweep", "base", "creative", "factual", "heads") if name in results]
    missing = [name for name in wanted if finished.count(name) != 1]
    trials = len(results.get("sweep", {}).get("trials", []))
    children = sum("mlflow.parentRunId" in run.data.tags for run in runs if run.info.status == "FINISHED")
    text = f"MLflow has every run once: {len(wanted)} stages, {children} of {trials} trials"
    return Check(text + (f"; missing {', '.join(missing)}" if missing else ""), not missing and children == trials)


def _check_item(check: Check) -> str:
    mark = "<span class=ok>holds</span>" if check.holds else "<span class=bad>does not hold</span>"
    return f"<li>{mark}: {html.escape(check.text)}</li>"


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _dial_table(evaluation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{row['dial']:.2f}<td>{html.escape(row['example'])}<td>{_interval(row['accuracy'])}"
        f"<td>{_interval(row['diversity'])}<td>{row['valid']:.2f}"
        for row in evaluation["rows"]
    )
    head = "<tr><th>dial<th>answer<th>accuracy<th>diversity<th>valid"
    asked = html.escape(evaluation["question"])
    return f"<p class=note>{evaluation['questions']} questions x {evaluation['seeds']} seeds. {asked}</p><table>{head}{rows}</table>"


def _front(evaluation: dict[str, Any]) -> str:
    rows = evaluation["rows"]
    points = [(row["diversity"]["mean"], row["accuracy"]["mean"]) for row in rows]
    labels = [f"dial {row['dial']:.2f}" for row in rows]
    return chart([Series("dial", points, labels)], x="diversity", y="factual accuracy")


def _shown(shown: dict[str, Any]) -> str:
    tokens = shown["ensemble"].get("tokens") or []
    verdict = html.escape(str(shown["ensemble"].get("verdict")))
    legend = '<p class=note>Under each token: <b style="color:#0072b2">should diverge</b>, <b style="color:#d55e00">deviates from fact</b>.'
    return f"<p>{html.escape(shown['prompt'])}</p>{heat_map(tokens)}{legend} Verdict: {verdict}.</p>"


def _losses(folder: Path) -> str:
    series = []
    for name in ("base", "creative", "factual"):
        rows = read_rows(folder / name / "metrics.jsonl")
        series.append(Series(name, [(row["tokens"], row["loss"]) for row in rows if "loss" in row]))
        held_out = [(row["tokens"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        series.append(Series(f"{name} held out", held_out))
    return chart([s for s in series if s.points], x="tokens", y="loss (nats a token)")


def _sweep(sweep: dict[str, Any]) -> str:
    trials = [t for t in sweep.get("trials", []) if isinstance(t.get("metric"), int | float)]
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        rest = ", ".join(f"{k}={v}" for k, v in sorted(trial["params"].items()) if k != "train.lr")
        groups.setdefault(rest, []).append(trial)
    series = [
        Series(
            name,
            [(t["params"]["train.lr"], t["metric"]) for t in group],
            [json.dumps(t["params"]) for t in group],
            line=False,
        )
        for name, group in sorted(groups.items())
    ]
    best = html.escape(json.dumps(sweep.get("params")))
    return f"<p class=note>{len(trials)} trials; the training stages used {best}.</p>" + chart(
        series, x="lr", y="validation loss", log_x=True
    )


def _heads(heads: dict[str, Any]) -> str:
    """What the heads are worth on unseen entities, and what p_dev says where nobody told the model anything."""
    metrics = heads.get("metrics", {})
    names = {
        "auroc": "AUROC",
        "placebo_auroc": "AUROC, shuffled labels",
        "auprc": "AUPRC",
        "base_rate": "base rate",
        "ece": "ECE",
        "tokens": "tokens",
    }
    rows = [
        f"<tr><td>{head}</td>" + "".join(f"<td>{metrics[head].get(name, float('nan')):.4g}</td>" for name in names)
        for head in ("p_dev", "p_div")
        if head in metrics
    ]
    top = "".join(f"<th>{title}</th>" for title in ("head", *names.values()))
    unknown = metrics.get("unknown", {})
    known = (
        f"<p class=note>p_dev of guesses about what nobody told it: {unknown['p_dev_absent']:.2f}; of true answers: "
        f"{unknown['p_dev_known']:.2f}; AUROC between the two: {unknown['auroc']:.3f}</p>"
        if unknown
        else ""
    )
    return f"<table><tr>{top}</tr>{''.join(rows)}</table>{known}"
