"""Published rules for a learning rate: their numbers, and when they are said."""

from __future__ import annotations

import pytest

from tigerbot.spec import SweepSpec, TrainSpec, parse_spec
from tigerbot_jobs.sweep.priors import mup_transfer, prior_lines, size_of, step_law

TRAIN = {
    "kind": "train",
    "name": "t",
    "model": {"preset": "tiny"},
    "data": {"train": [{"path": "x"}]},
    "train": {"tokens": 200_000_000},
}


def specs(**fields: object) -> tuple[SweepSpec, TrainSpec]:
    raw = {"kind": "sweep", "name": "s", "target": "t.yaml", "space": {"train.lr": {"log_uniform": [1e-5, 1e-4]}}}
    sweep, train = parse_spec(raw | fields), parse_spec(TRAIN)
    assert isinstance(sweep, SweepSpec) and isinstance(train, TrainSpec)
    return sweep, train


def test_step_law_gives_the_published_numbers() -> None:
    lr, batch = step_law(10_000_000, 200_000_000)

    assert lr == pytest.approx(6.4e-3, rel=0.01) and batch == pytest.approx(0.58 * 2e8**0.571)


def test_a_model_twice_as_wide_wants_half_the_learning_rate() -> None:
    assert mup_transfer(3e-3, 64, 128) == 1.5e-3


def test_advice_names_its_source_and_a_space_that_does_not_hold_it() -> None:
    sweep, train = specs(transfer_from={"width": 64, "lr": 3e-3})

    said = "\n".join(prior_lines(sweep, train))

    assert "arXiv 2503.04715, an extrapolation" in said and "arXiv 2203.03466" in said
    assert "does not hold" in said


def test_a_sweep_over_something_else_gets_no_advice() -> None:
    sweep, train = specs(space={"train.weight_decay": {"uniform": [0, 1]}})

    assert prior_lines(sweep, train) == []


def test_the_size_of_a_preset_counts_its_matrices() -> None:
    from tigerbot.models import build

    model = build("tiny", 512, seed=1)
    _, train = specs()
    size = size_of(train)

    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    assert size is not None and size.parameters == matrices
