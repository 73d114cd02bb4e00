"""What the dial is measured by: fronts, ranks, and rules that do what their names say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from benchmarks.dial_front import Front, compared, correlation, hypervolume
from benchmarks.dial_questions import write
from benchmarks.dial_rules import EntropyRule, FactualNucleus, ResidualEntropy, TemperatureRule, contenders
from tigerbot.spec import DialSpec
from tigerbot_jobs.data.world import World
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL
from tigerbot_serve.ensemble.offline import View


def front(accuracy: list[float], diversity: list[float], items: int = 40) -> Front:
    rng = np.random.default_rng(1)
    right = np.array([(rng.random(items) < share).astype(float) for share in accuracy])
    new = np.array([np.full(10, share) for share in diversity])
    return Front("x", tuple(np.linspace(0, 1, len(accuracy))), right, new, False)


def test_hypervolume_is_the_area_under_the_points_that_nothing_beats() -> None:
    assert hypervolume([(1.0, 0.5), (0.5, 1.0), (0.4, 0.4)]) == pytest.approx(0.75)
    assert hypervolume([]) == 0.0


def test_a_front_that_is_better_everywhere_is_told_from_one_that_is_equal() -> None:
    good, poor = front([0.95, 0.9, 0.8], [0.2, 0.8, 0.9]), front([0.5, 0.4, 0.3], [0.1, 0.3, 0.5])

    assert compared(good, poor).low > 1 and compared(good, good).value == 1.0


def test_ranks_say_which_way_the_dial_turns() -> None:
    turned = front([0.95, 0.6, 0.05], [0.1, 0.5, 0.9])

    assert correlation(turned, "accuracy").value == pytest.approx(-1)
    assert correlation(turned, "diversity").value == pytest.approx(1)


def test_contenders_have_an_equal_number_of_points() -> None:
    assert {len(one.settings) for one in contenders(DialSpec())} == {7}


def view(setting: float, said: int = 0) -> View:
    rows = torch.log_softmax(torch.tensor([[4.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), dim=-1)
    p_n = torch.tensor([0.1, 0.75])
    return View(setting, rows, rows.flip(0), p_n, p_n, [[1] * said] * 2)


def test_each_rule_does_what_its_name_says() -> None:
    assert TemperatureRule(FACTUAL, DialSpec())(view(0.7)).temperature_n.tolist() == pytest.approx([0.7, 0.7])
    late, early = (FactualNucleus(CREATIVE)(view(0.9, said)).top_p[0] for said in (5, 0))
    assert early == 0.9 and late == pytest.approx(0.9 * 0.9**5)
    sure, open_ended = ResidualEntropy()(view(1.0)).top_p
    assert sure < 1 and open_ended == pytest.approx(1.0)  # the second row is as open as p_div says it is
    assert EntropyRule(DialSpec())(view(0.5)).logprobs_nV.exp().sum(dim=-1).tolist() == pytest.approx([1, 1])


def test_validation_questions_are_not_those_that_are_measured(tmp_path) -> None:
    write(tmp_path, questions=50, prompts=6)

    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    measured = {q.fact.id for count, seed in ((200, 1), (300, 2)) for q in World(1).eval_questions(count, seed=seed)}
    told = {one["prompt"] for one in rows}
    assert len(rows) == 50 and all(one["accept"] and one["accept"][0] not in one["reject"] for one in rows)
    assert not told & {q.question for q in World(1).eval_questions(200, seed=1) if q.fact.id in measured}
    for line in (tmp_path / "prompts.jsonl").read_text().splitlines():
        re.compile(json.loads(line)["pattern"])
