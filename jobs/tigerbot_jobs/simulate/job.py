"""`kind: simulate`: every policy of the spec, and what to buy where it is asked; `simulation.json` in the run's folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tigerbot.progress import stage
from tigerbot.runs import Run, write_json
from tigerbot.spec import BuySpec, SimulateSpec
from tigerbot_jobs.simulate.buy import Offer, Shelf, count, shelves
from tigerbot_jobs.simulate.outcome import money, simulate
from tigerbot_jobs.simulate.setting import Setting, settings


def run(run: Run) -> dict[str, Any]:
    """Simulate; the result holds what `tables.result_lines` shows."""
    spec = run.spec
    assert isinstance(spec, SimulateSpec)
    result = simulate_spec(spec)
    write_json(run.folder / "simulation.json", result)
    return run.finish(result)


def simulate_spec(spec: SimulateSpec) -> dict[str, Any]:
    """The policies of a spec, side by side.

    Raises:
        InputError: the spec contradicts itself.
    """
    situations = settings(spec)
    with stage(
        f"simulating {spec.cards:,} cards for {spec.days:g} days", total=len(situations), unit="policies"
    ) as shown:
        policies = []
        for situation in situations:
            policies.append(_policy(spec, situation))
            shown.advance(note=situation.name)
    result: dict[str, Any] = {"about": _about(spec, situations[0]), "policies": policies}
    if spec.buy is not None:
        result["buy"] = _buy(spec, spec.buy)
    return result


def _policy(spec: SimulateSpec, situation: Setting) -> dict[str, Any]:
    outcome = simulate(situation, replicas=spec.replicas, seed=spec.seed)
    cost = money(outcome, situation, cards_per_node=spec.cards_per_node, price_per_card_hour=spec.price_per_card_hour)
    return asdict(outcome) | {"money": asdict(cost), "inputs": asdict(situation.policy)}


def _buy(spec: SimulateSpec, buy: BuySpec) -> list[dict[str, Any]]:
    with stage("simulating what to buy", total=count(spec, buy), unit="simulations") as shown:
        found = shelves(spec, buy, shown)
    names = [policy.name or policy.preset for policy in spec.policies]
    return [_shelf(spec, shelf, names) for shelf in found]


def _shelf(spec: SimulateSpec, shelf: Shelf, names: list[str]) -> dict[str, Any]:
    return {
        "cards": shelf.cards,
        "nodes": shelf.cards // spec.cards_per_node,
        "offers": [_offer(offer) for offer in shelf.offers],
        "intervals": [_offer(offer) for offer in shelf.intervals],
        "best": [_offer(shelf.best(name)) for name in names],
    }


def _offer(offer: Offer) -> dict[str, Any]:
    outcome = offer.outcome
    return {
        "policy": offer.policy,
        "spares": offer.spares,
        "standbys": offer.standbys,
        "memory_every_s": outcome.memory_every_s,
        "goodput": outcome.goodput.mean,
        "goodput_low": outcome.goodput.low,
        "goodput_high": outcome.goodput.high,
        "blocked": outcome.shares["checkpoint_block"],
        "total": offer.money.total,
        "per_useful": offer.money.per_useful,
    }


def _about(spec: SimulateSpec, situation: Setting) -> str:
    return (
        f"{spec.cards:,} cards in {situation.nodes:,} nodes and {spec.spares} spares, {spec.days:g} days, failures of "
        f"{spec.failures.preset}: one every {situation.mtbf_s / 3600:.2f} h; {spec.replicas:,} replicas, seed {spec.seed}"
    )
