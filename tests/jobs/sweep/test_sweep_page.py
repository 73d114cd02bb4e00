"""What a person sees of a sweep: the page, in text and in a real browser, the verb, the page in MLflow."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_story import JournalStory
from typer.testing import CliRunner

from tigerbot.errors import InputError, StorageError
from tigerbot.runs import hold_folder, write_json
from tigerbot.spec import SweepSpec, parse_spec
from tigerbot_jobs.commands import register
from tigerbot_jobs.sweep.analysis_read import read_history
from tigerbot_jobs.sweep.page import About, page
from tigerbot_jobs.sweep.page_spec import ready_spec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SPACE = {"lr": {"log_uniform": [1e-4, 1e-1]}, "width": {"choice": [64, 128, 256]}, "dropout": {"uniform": [0, 0.5]}}
SPEC = {"kind": "sweep", "name": "bowl", "target": "objectives:bowl", "space": SPACE, "metric": "loss"}
EVIL = "</style><script>alert('x')</script>\" onload=\"alert(1) \x1b[31m 学习率"


def drawn(story: JournalStory, folder: Path, **spec: Any) -> str:
    path = story.write(folder / "bowl" / "trials.jsonl")
    return page(read_history(path), About("bowl", "done", SPEC | spec))


def sections(text: str) -> set[str]:
    return set(re.findall(r"<section id=(\w+)>", text))


def tiger(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    result = CliRunner().invoke(app, ["report", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


ALWAYS = {"next", "best", "seeds", "importance", "cost", "failures"}
WITH_TRIALS = ALWAYS | {"spec", "parallel", "slices", "table"}


@pytest.mark.parametrize(
    ("story", "spec", "shown"),
    [
        (JournalStory(), {}, ALWAYS),
        (JournalStory(trials=1).random_search(1), {}, ALWAYS | {"spec", "table"}),
        (JournalStory(trials=12, mode="max").random_search(12).fresh_seeds(3, 1), {}, WITH_TRIALS),
        (JournalStory(trials=60, searcher="tpe", scheduler="asha").asha(60).fresh_seeds(), {}, WITH_TRIALS | {"rungs"}),
        (JournalStory(scheduler="pbt", price=None).pbt(), {}, WITH_TRIALS | {"genealogy"}),
        (JournalStory().random_search(9), {"objectives": {"tokens_per_s": "max"}}, WITH_TRIALS | {"front"}),
        (JournalStory().trial(0, status="failed", cause="bug", error="ValueError"), {}, ALWAYS),
    ],
    ids=["empty", "one", "max", "asha", "pbt", "objectives", "failed"],
)
def test_every_kind_of_sweep_has_a_page_whose_pictures_are_whole(story, spec, shown, tmp_path: Path) -> None:
    text = drawn(story, tmp_path, **spec)

    assert sections(text) == shown
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "nan" not in picture.lower().replace("nand", "") and 'aria-label="' in picture
        ElementTree.fromstring(picture)
    for tag in ("table", "figure", "details", "section", "div", "span", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


VALUES = st.one_of(st.floats(width=32), st.integers(-3, 3), st.sampled_from([1e300, -1e300, 5e-324, None]))
PARAMS = st.dictionaries(
    st.sampled_from(["lr", "width", "on", "路"]),
    st.one_of(VALUES, st.booleans(), st.text(max_size=4), st.lists(st.integers(0, 2), max_size=2)),
)
NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
TIMES = {"t": st.floats(0, 1e6)}
EVENTS = st.one_of(
    st.fixed_dictionaries(
        {"event": st.just("begin"), "name": NAMES, "params": PARAMS, "config": st.sampled_from(["x", "y", "z"])}
        | {
            "seed": st.integers(0, 2),
            "fresh": st.booleans(),
            "cards": st.sampled_from([0, 1.0]),
            "after": st.sampled_from(["", "node"]),
        }
        | TIMES
    ),
    st.fixed_dictionaries(
        {"event": st.just("point"), "name": NAMES, "step": st.integers(-1, 9), "value": VALUES} | TIMES
    ),
    st.fixed_dictionaries(
        {"event": st.just("rung"), "name": NAMES, "rung": st.integers(0, 1), "step": st.integers(0, 9), "value": VALUES}
        | {"promoted": st.booleans()}
        | TIMES
    ),
    st.fixed_dictionaries(
        {
            "event": st.just("exploit"),
            "name": NAMES,
            "from": NAMES,
            "step": st.integers(0, 9),
            "before": PARAMS,
            "after": PARAMS,
        }
        | TIMES
    ),
    st.fixed_dictionaries(
        {"event": st.just("end"), "name": NAMES, "status": st.sampled_from(["done", "stopped", "failed", "killed"])}
        | {"metric": VALUES, "seconds": st.floats(0, 1e5), "cause": st.sampled_from(["", "bug"])}
        | TIMES
    ),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.sampled_from(["min", "max"]))
def test_whatever_happened_there_is_a_page(tmp_path_factory, events: list[dict[str, Any]], mode: str) -> None:
    story = JournalStory(mode=mode)
    story.events += events

    text = drawn(story, tmp_path_factory.mktemp("any"), objectives={"width": "max"})

    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(picture)
        assert not re.search(r'="[^"]*\b(nan|inf)\b', re.sub(r'aria-label="[^"]*"', "", picture))


def test_words_from_outside_stay_words_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    story = JournalStory(trials=3)
    story.events[0] |= {"metric": EVIL, "searcher": EVIL, "scheduler": EVIL}
    for index in range(6):
        params = {EVIL: f"{EVIL}{index % 2}", "lr": 10.0**-index}
        story.begin(f"{EVIL}{index}", params, config=EVIL, seed=index // 3, t=float(index), node=EVIL)
        story.point(f"{EVIL}{index}", 1, 1.0 + index, index + 0.5)
        story.rung(f"{EVIL}{index}", 0, 1, 1.0 + index, index < 3)
        story.end(f"{EVIL}{index}", "done", 1.0 + index, seconds=1, t=index + 1)
    story.trial(7, status="failed", cause=EVIL, error=EVIL)
    path = story.write(tmp_path / "trials.jsonl")

    text = page(read_history(path), About(EVIL, EVIL, {"space": {}, "target": EVIL, "objectives": {EVIL: "max"}}))

    assert text.count("<script") == 1 and text.count("</style>") == 1 and "\x1b" not in text
    assert 'onload="' not in text and "alert(&#x27;x&#x27;)" in text and "学习率" in text
    assert not re.search(r"(src|href)=[\"']?(?!#)", text) and "@import" not in text and "url(" not in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(picture)


def test_the_winners_curse_stands_beside_the_fresh_mean(tmp_path: Path) -> None:
    with_seeds = drawn(JournalStory(trials=30).random_search(30).fresh_seeds(3, 5), tmp_path)
    without = drawn(JournalStory(trials=30).random_search(30), tmp_path)

    assert "by 5 fresh seeds" in with_seeds and "flattered" in with_seeds and "chance to be best" in with_seeds
    assert "No configuration ran with a second seed" in without and "confirm: {top: 5, seeds: 5}" in without


def test_a_best_at_the_edge_of_the_space_asks_for_a_wider_one(tmp_path: Path) -> None:
    space = SPACE | {"lr": {"log_uniform": [1e-4, 3.5e-3]}}
    story = JournalStory(trials=20)
    for index in range(20):
        story.trial(index, {"lr": 1e-4 * 35 ** (index / 19), "width": 256, "dropout": 0.3, "act": "relu"})

    assert "<b>Widen lr</b>" in drawn(story, tmp_path, space=space)
    assert "<b>Widen" not in drawn(story, tmp_path)


def test_the_recommended_spec_of_a_function_is_a_sweep_of_one_point() -> None:
    params = {"lr": 3.1e-3, "kind": "中: #1", "on": True}

    ready = ready_spec("bowl", SPEC | {"params": {"sleep_s": 0.1}}, params)

    spec = parse_spec(yaml.safe_load(ready.text))
    assert isinstance(spec, SweepSpec) and spec.name == ready.name == "bowl-best" and ready.problem == ""
    assert spec.space == {name: {"choice": [value]} for name, value in params.items()}
    assert spec.params == {"sleep_s": 0.1} and spec.trials == 1


def test_the_recommended_spec_of_a_train_target_is_that_spec_with_its_values(tmp_path: Path) -> None:
    target = tmp_path / "pretrain.yaml"
    shutil.copy("jobs/pretrain.yaml", target)

    sweep = SPEC | {"target": str(target), "params": {"train.tokens": 40_960}}
    ready = ready_spec("town", sweep, {"train.lr": 0.002, "train.batch_tokens": 4096})

    raw = yaml.safe_load(ready.text)
    assert ready.problem == "" and raw["name"] == "town-best" and raw["kind"] == "train"
    assert (raw["train"]["lr"], raw["train"]["batch_tokens"], raw["train"]["tokens"]) == (0.002, 4096, 40_960)
    assert raw["train"]["micro_batch"] == 32 and "weight_decay" in raw["train"] and "keep" not in raw["train"]
    parse_spec(raw)


@pytest.mark.parametrize(("target", "problem"), [("gone.yaml", "cannot be read"), ("", "not beside its journal")])
def test_a_spec_that_cannot_be_made_is_its_fields_with_the_reason(target: str, problem: str) -> None:
    ready = ready_spec("bowl", {"target": target}, {"train.lr": 0.1})

    assert problem in ready.problem and yaml.safe_load(ready.text) == {"train.lr": 0.1}


def test_the_verb_says_how_it_stands_and_writes_the_page(tmp_path: Path) -> None:
    story = JournalStory(trials=20).random_search(10).fresh_seeds(2, 3)
    story.trial(30, status="failed", cause="memory", error="out of\nmemory \x1b[31m")
    story.write(tmp_path / "bowl" / "trials.jsonl")

    said = tiger("bowl", "--in", str(tmp_path), "--html", str(tmp_path / "out.html"))

    assert said.startswith("bowl: stopped, 17/20 trials") and "by 3 fresh seeds" in said
    assert "failed, memory: 1 attempts of 1 trials: out of memory" in said and "\x1b" not in said
    assert "not logged: the sweep's spec" in said
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")


def test_a_sweep_that_runs_says_what_is_left_and_one_that_nobody_holds_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "bowl"
    JournalStory(trials=30).random_search(20).write(folder / "trials.jsonl")
    write_json(folder / "spec.json", {"spec": SPEC | {"budget": {"money": 50.0}, "tracking": {}}})
    write_json(folder / "state.json", {"status": "running"})

    left = tiger("bowl", "--in", str(tmp_path))
    lock = hold_folder(folder)
    runs = tiger("bowl", "--in", str(tmp_path))
    lock.close()

    assert left.startswith("bowl: interrupted, 20/30 trials; best loss") and " left" not in left.splitlines()[0]
    assert runs.startswith("bowl: running, 20/30 trials, ") and "49.33 of 50.00 money left" in runs


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bowel", r"no run is called 'bowel'; did you mean bowl\?"),
        ("young", r"has no journal yet; it begins with the first trial"),
        ("trained", r"is a run of kind train; only kind: sweep keeps a journal"),
    ],
)
def test_a_sweep_that_is_not_there_is_one_clear_line(given: str, said: str, tmp_path: Path) -> None:
    JournalStory().write(tmp_path / "bowl" / "trials.jsonl")
    for name, kind in (("young", "sweep"), ("trained", "train")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "spec.json", {"spec": {"kind": kind}})

    with pytest.raises(InputError, match=said):
        tiger(given, "--in", str(tmp_path))


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    JournalStory().write(tmp_path / "bowl" / "trials.jsonl")

    with pytest.raises(StorageError, match=r"no such file or directory; give a file that can be written"):
        tiger("bowl", "--in", str(tmp_path), "--html", str(tmp_path / "nowhere" / "page.html"))


@pytest.mark.soak
def test_the_page_is_logged_to_the_newest_run_of_the_sweep(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from tigerbot.tracking import serve_tracking

    folder, uri = tmp_path / "bowl", f"sqlite:///{tmp_path}/mlflow.db"
    JournalStory(trials=3).random_search(3).write(folder / "trials.jsonl")
    write_json(folder / "spec.json", {"spec": SPEC | {"tracking": {"uri": uri, "experiment": "sweeps"}}})
    server = serve_tracking(uri)
    client = MlflowClient(server.url)
    early = tiger("bowl", "--in", str(tmp_path))
    experiment = client.create_experiment("sweeps")
    tags = {"tiger.folder": str(folder), "tiger.kind": "sweep"}
    replaced, mine = (client.create_run(experiment, start_time=at, tags=tags).info.run_id for at in (1000, 2000))

    said = tiger("bowl", "--in", str(tmp_path))

    assert "has no run of this sweep yet" in early and f"logged to MLflow run {mine}" in said
    assert [found.path for found in client.list_artifacts(mine)] == ["report.html"]
    assert client.list_artifacts(replaced) == []
    server.stop()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_three_thousand_trials_open_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    story = JournalStory(trials=3000, searcher="tpe", scheduler="asha").asha(2990).fresh_seeds()
    text = drawn(story, tmp_path)
    path, problems = tmp_path / "report.html", []
    path.write_text(text, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1100, "height": 900}, locale="zh-CN", offline=True)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        opened = context.new_page()
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
        opened.goto(path.as_uri())
        assert opened.locator("h2:has-text('下一步')").is_visible()
        opened.click("label[for=zh]")
        assert opened.locator("h2:has-text('What to do next')").is_visible()
        assert not opened.locator("h2 >> text=下一步").is_visible()
        opened.click(".spec button")
        opened.locator(".spec button.copied").wait_for(timeout=5000)
        copied = opened.evaluate("navigator.clipboard.readText()")
        opened.locator("summary", has_text="the 100 best of").click()
        assert opened.locator("#table tr").count() == 101
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()

    assert len(text.encode()) < 3_000_000 and problems == []
    assert parse_spec(yaml.safe_load(copied)).name == "bowl-best"
