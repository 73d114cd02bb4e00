"""What should I buy: spares, standbys and the snapshot interval, by goodput and by money.

For each size: every policy over the numbers of spares, our own also over its standbys; then ours over the snapshot
interval at the spares that cost least per useful card-hour. The least cost is what to buy.
"""

from __future__ import annotations

from dataclasses import dataclass

from tigerbot.progress import Stage
from tigerbot.spec import BuySpec, PolicySpec, SimulateSpec
from tigerbot_jobs.simulate.outcome import Money, Outcome, money, simulate
from tigerbot_jobs.simulate.setting import setting


@dataclass(frozen=True)
class Offer:
    """One combination: what it gives and what it costs."""

    cards: int
    policy: str
    spares: int
    standbys: int
    outcome: Outcome
    money: Money


@dataclass(frozen=True)
class Shelf:
    """All offers of one size. `intervals` are the best offer at other snapshot intervals."""

    cards: int
    offers: list[Offer]
    intervals: list[Offer]

    def best(self, policy: str) -> Offer:
        """The offer with the least cost per useful card-hour."""
        return min((offer for offer in self.offers if offer.policy == policy), key=lambda one: one.money.per_useful)


def shelves(spec: SimulateSpec, buy: BuySpec, shown: Stage) -> list[Shelf]:
    """A shelf per size."""
    return [_shelf(spec, buy, cards, shown) for cards in buy.cards]


def count(spec: SimulateSpec, buy: BuySpec) -> int:
    """How many simulations `shelves` makes."""
    per_spares = sum(len(buy.standbys) if policy.preset == "ours" else 1 for policy in spec.policies)
    keeps_memory = sum(policy.preset == "ours" for policy in spec.policies)
    return len(buy.cards) * (len(buy.spares_percent) * per_spares + keeps_memory * len(buy.memory_every_s))


def _shelf(spec: SimulateSpec, buy: BuySpec, cards: int, shown: Stage) -> Shelf:
    shelf = Shelf(cards, [], [])
    for policy in spec.policies:
        for percent in buy.spares_percent:
            spares = round(cards / spec.cards_per_node * percent / 100)
            for standbys in buy.standbys if policy.preset == "ours" else [0]:
                if standbys <= spares or standbys == min(buy.standbys):
                    shelf.offers.append(_offer(spec, policy, cards, spares, standbys))
                shown.advance(note=f"{cards:,} cards")
        if policy.preset == "ours":
            best = shelf.best(policy.name or policy.preset)
            for every_s in buy.memory_every_s:
                other = policy.model_copy(update={"memory_every_s": every_s})
                shelf.intervals.append(_offer(spec, other, cards, best.spares, best.standbys))
                shown.advance()
    return shelf


def _offer(spec: SimulateSpec, policy: PolicySpec, cards: int, spares: int, standbys: int) -> Offer:
    wanted = policy.model_copy(update={"standbys": standbys})
    here = spec.model_copy(update={"cards": cards, "spares": spares, "min_cards": None, "throughput": []})
    situation = setting(here, wanted)
    outcome = simulate(situation, replicas=spec.replicas, seed=spec.seed)
    cost = money(outcome, situation, cards_per_node=spec.cards_per_node, price_per_card_hour=spec.price_per_card_hour)
    return Offer(cards, outcome.name, spares, situation.standbys, outcome, cost)
