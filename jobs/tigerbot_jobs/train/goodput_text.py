"""The account of a run for a terminal and for programs, and how a run's ledger is found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tigerbot_jobs.finding import find_record, is_held
from tigerbot_jobs.shown import bar, clock, money, printable, span
from tigerbot_jobs.train.goodput import Account, Loss, account, as_metrics, percentile
from tigerbot_jobs.train.ledger import read_events

LEDGER = "ledger.jsonl"
_SHOWN = 30  # incidents in a terminal; the page and --json have them all
MEANINGS = {
    "step": "optimizer steps that are part of the history",
    "recompute": "steps that a rollback or restore made undone",
    "data_wait": "waiting for the next batch",
    "checkpoint_block": "training held up by a snapshot or checkpoint",
    "eval": "held-out loss",
    "hang_wait": "from the last step to the fault's being seen",
    "idle_after_failure": "from there to a new group, and no driver at all",
    "restore": "state being brought back",
    "resize": "going on with fewer or more workers",
    "queue": "waiting for room in the cluster",
    "start": "processes, imports, the first group, the model",
    "other": "between these, the end of the run",
}


def find_ledger(run: str, folder: Path) -> Path:
    """The ledger of a run by its name in a storage folder, by its folder, or by the file itself.

    Raises:
        InputError: there is no such run, or it has no ledger.
    """
    return find_record(run, folder, LEDGER, kind="train", what="ledger", begins="the training, after the checks")


def read_account(ledger: Path, price_per_card_hour: float | None = None) -> tuple[Account, str]:
    """The account of a run up to now, and its state: running, done, failed, stopped, or interrupted (nobody goes on with it)."""
    running = is_held(ledger.parent)
    found = account(read_events(ledger), time.time() if running else None, price_per_card_hour)
    ended = {"killed": "stopped"}.get(found.ended, found.ended)
    return found, ended or ("running" if running else "interrupted")


def as_json(found: Account, state: str) -> dict[str, Any]:
    """Everything the table and the page show, for programs."""
    about = {"name": found.name, "state": state, "began": found.began, "drivers": found.lives}
    return (
        about
        | as_metrics(found)
        | {
            "price_per_card_hour": found.price_per_card_hour,
            "best_tokens_per_s": found.best_tokens_per_s,
            "stopped_s": found.stopped_s,
            "missing_lines": found.missing_lines,
            "seconds": found.seconds,
            "incident_list": [_incident_json(loss) for loss in found.losses],
            "resize_list": [_incident_json(loss) for loss in found.resizes],
        }
    )


def table(found: Account, state: str) -> Iterator[str]:
    """Lines: what the run is, where each second went, what it cost, one line for each incident."""
    yield f"{printable(found.name) or 'run'}: {headline(found, state)}"
    yield f"goodput {found.goodput:.1%}; {throughput(found)}"
    yield ""
    yield f"  {'category':<20}{'seconds':>12}{'share':>8}{'' if found.cost is None else '      cost'}"
    for name, meaning in MEANINGS.items():
        seconds = found.seconds[name]
        if seconds >= 0.05:
            share = seconds / found.wall_s
            cost = "" if found.cost is None else f"{money(found.cost * share, found.cost):>10}"
            yield f"  {name:<20}{seconds:>12,.1f}{share:>8.1%}{cost}  {bar(share)}  {meaning}"
    cost = "" if found.cost is None else f"{money(found.cost, found.cost):>10}"
    yield f"  {'wall time':<20}{found.wall_s:>12,.1f}{1:>8.1%}{cost}"
    if found.stopped_s:
        yield f"  {found.stopped_s:,.0f} s of it between a stop and the next start, for which no card is paid"
    if found.missing_lines:
        yield f"  {found.missing_lines} events are missing: they could not be written"
    yield ""
    yield summary(found)
    for number, loss in list(enumerate(found.losses, 1))[-_SHOWN:]:
        yield f"  {number:>3}  {incident_line(loss, found)}"
    if len(found.losses) > _SHOWN:
        yield f"  (the last {_SHOWN}; --html and --json have all)"
    for loss in found.resizes[-_SHOWN:]:
        yield f"    +  {incident_line(loss, found)}"


def headline(found: Account, state: str) -> str:
    drivers = "" if found.lives < 2 else f", {found.lives} drivers"
    cost = (
        "" if found.cost is None else f", {money(found.cost, found.cost)} at {found.price_per_card_hour:g} a card-hour"
    )
    return f"{state}, {span(found.wall_s)} of wall time, {found.card_hours:,.2f} card-hours{cost}{drivers}"


def throughput(found: Account) -> str:
    kept = f"{found.steps:,} steps kept, {found.undone_steps:,} done in vain"
    rate = f"{found.goodput_throughput:.1%} of the tokens possible at the best rate ({found.best_tokens_per_s:,.0f} a second)"
    stored = f", {found.persisted_bytes / 1e9:,.2f} GB persisted" if found.persisted_bytes else ""
    return f"{rate}; {kept}, {found.tokens:,} tokens{stored}"


def summary(found: Account) -> str:
    """The incidents in one line: how many, and percentiles of the time to notice and to recover."""
    count = len(found.losses)
    parts = [f"{count} incident{'' if count == 1 else 's'}"]
    for name, values in (("recovery", found.mttr_s), ("noticing", found.mttd_s)):
        if values:
            p50, p90 = percentile(values, 50), percentile(values, 90)
            parts.append(f"{name} p50 {p50:.2f} s, p90 {p90:.2f} s, worst {max(values):.2f} s")
    return "; ".join(parts)


def incident_line(loss: Loss, found: Account) -> str:
    """One incident: when, what, who, what was done, how long it took, what it cost."""
    incident = loss.incident
    seen = f", seen after {incident.mttd_s:.2f} s" if incident.mttd_s is not None else ""
    acted = f", {', '.join(dict.fromkeys(incident.actions))}" if incident.actions else ""
    cost = (
        ""
        if found.cost is None or not found.wall_s
        else f", cost {money(found.cost * loss.total_s / found.wall_s, found.cost)}"
    )
    took = f"{loss.total_s:.2f} s lost{cost}, {len(incident.undone)} steps undone"
    text = f"{clock(incident.seen_at)}  {incident.kind}{who(loss)}{seen}{acted}, {outcome(loss)}, {took}"
    evidence = next((fault.evidence for fault in incident.faults if fault.evidence), "")
    return printable(f"{text}: {evidence[:160]}" if evidence else text)


def who(loss: Loss) -> str:
    fault = loss.incident.faults[0]
    rank = f"rank {fault.rank}" if fault.rank >= 0 else ""
    named = ", ".join(part for part in (rank, fault.worker, fault.node) if part)
    return f" ({named})" if named else ""


def outcome(loss: Loss) -> str:
    incident = loss.incident
    if incident.down_from is None:
        return "training went on"
    if incident.mttr_s is None:
        return "not back yet"
    return f"back after {incident.mttr_s:.2f} s" + (f" from {incident.tier}" if incident.tier else "")


def _incident_json(loss: Loss) -> dict[str, Any]:
    incident = loss.incident
    return {
        "kind": incident.kind,
        "faults": [vars(fault) for fault in incident.faults],
        "seen_at": incident.seen_at,
        "last_step_at": incident.last_step_at,
        "acted_at": incident.acted_at,
        "actions": incident.actions,
        "group_formed_at": incident.formed_at,
        "restored_at": incident.restored_at,
        "tier": incident.tier,
        "first_step_at": incident.first_step_at,
        "mttd_s": incident.mttd_s,
        "mttr_s": incident.mttr_s,
        "steps_lost": len(incident.undone),
        "lost_s": loss.total_s,
        "seconds": loss.seconds,
    }
