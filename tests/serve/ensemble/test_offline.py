"""The rule that is fitted and measured is the rule that is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tigerbot.errors import DataError, InputError
from tigerbot.spec import DialSpec, load_spec
from tigerbot_serve.engine.request import Request
from tigerbot_serve.ensemble.fit import Case, dial_block, fit, front, main, read_cases
from tigerbot_serve.ensemble.offline import Choice, Pair, ServedRule, View

PROMPTS = ("The fox", "狐狸在河边", "Rain falls on the old town")


@pytest.mark.parametrize("dial", [0.0, 0.4, 1.0])
def test_greedy_answers_are_those_of_the_engine(world, heads, engine_of, ask, dial: float) -> None:
    w_dev = torch.randn(257, generator=torch.Generator().manual_seed(1)) * 0.1
    folder = str(heads(p_div=0.5, w_dev=w_dev))
    tied = {"temperature_factual": 0.0, "temperature_creative": 0.0}
    pair = Pair(str(world.creative), str(world.factual), folder)
    engine = engine_of("lora", heads=folder, dial=tied)

    offline = pair.answers(PROMPTS, ServedRule(DialSpec(**tied)), dial, seed=1, tokens=10)

    served = ask(engine, *(Request(tuple(pair.prompt(prompt)), 10, dial) for prompt in PROMPTS))
    ids = [[token for token in one.ids if token not in pair.ends.tolist()] for one in served]
    assert offline == [pair.tokenizer.decode(one) for one in ids]


def test_the_same_seed_says_the_same_and_another_rule_is_a_function_away(world) -> None:
    class Uniform:
        floor = 0.0

        def sides(self, setting: float) -> tuple[int, ...]:
            return (0,)

        def __call__(self, view: View) -> Choice:
            assert view.creative_nV is not None and view.factual_nV is None and view.p_div_n is None
            rows = torch.zeros_like(view.creative_nV)
            return Choice(rows, torch.ones(len(rows)), [1.0] * len(rows))

    pair = Pair(str(world.creative), str(world.factual), None)

    first, again, other = (pair.answers(PROMPTS, Uniform(), 0.5, seed, 8) for seed in (1, 1, 2))

    assert first == again != other


def test_the_fit_reports_the_front_of_a_dial(world, tmp_path: Path) -> None:
    questions, prompts = tmp_path / "q.jsonl", tmp_path / "p.jsonl"
    questions.write_text(json.dumps({"prompt": "The fox", "accept": [""], "reject": []}))
    prompts.write_text(json.dumps({"prompt": "Rain"}))
    found: list[dict] = []
    params = {"creative": str(world.creative), "factual": str(world.factual), "samples": 2, "a": 0.1, "b": 0.2}

    fit(params | {"questions": str(questions), "prompts": str(prompts), "seed": 0}, found.append)  # type: ignore[arg-type]

    assert found[0]["accuracy_factual"] == 1.0 and 0.5 <= found[0]["front"] <= 1.0


def test_an_answer_is_right_that_names_the_right_thing_and_no_other() -> None:
    case = Case("?", accept=("Pine Street",), reject=("Mill Street",))

    assert (
        case.right("it is pine street.")
        and not case.right("Mill Street")
        and not case.right("Pine Street, Mill Street")
    )
    assert Case("?", pattern="a+").valid("aa") and not Case("?", pattern="a+").valid("ab") and Case("?").valid("x")


def test_a_front_counts_only_what_nothing_beats() -> None:
    assert front([(0.5, 0.5), (1.0, 0.1), (0.4, 0.4)]) == pytest.approx(0.5 * 0.5 + 0.5 * 0.1)


@pytest.mark.parametrize("line", ["{", "[]", '{"accept": ["x"]}', '{"prompt": "x", "pattern": "("}', ""])
def test_a_file_that_holds_no_cases_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text(line)

    with pytest.raises(DataError):
        read_cases(str(tmp_path / "c.jsonl"))


def test_the_best_of_a_sweep_is_a_block_to_paste(tmp_path: Path, capsys) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"result": {"params": {"a": 0.51234, "mix": "linear", "seed": 3}}}))

    main(str(tmp_path))

    block = capsys.readouterr().out
    assert block == "dial:\n  a: 0.5123\n  mix: linear\n" == dial_block({"a": 0.51234, "mix": "linear"}) + "\n"
    with pytest.raises(InputError, match="no finished sweep"):
        main(str(tmp_path / "nowhere"))


def test_the_shipped_sweep_is_a_sweep_of_the_fit() -> None:
    spec = load_spec(Path(__file__).parents[3] / "jobs" / "fit_dial.yaml")

    assert spec.target == "tigerbot_serve.ensemble.fit:fit" and set(spec.space) <= set(DialSpec.model_fields)  # type: ignore[union-attr]
