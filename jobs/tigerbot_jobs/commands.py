"""The verbs of this package. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option("--in", metavar="FOLDER", help="a storage folder")]
RUNS = Path("tiger-runs")
nodes_app = typer.Typer(
    help="Nodes that failed: list their faults, keep one out, let one in again. Example: tiger nodes --in tiger-runs"
)


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the `tiger` command."""
    app.command()(demo)
    app.add_typer(nodes_app, name="nodes")
    app.command()(goodput)
    app.command()(replay)
    app.command()(report)
    app.command()(simulate)


def demo(
    exit_after: Annotated[
        bool, typer.Option("--exit", help="ask the fixed questions, write report.html, stop")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="start anew; the old results are removed")] = False,
    model: Annotated[
        str, typer.Option("--model", help="tiny, smollm2, or a folder with a Hugging Face model")
    ] = "tiny",
    folder: Annotated[Path, typer.Option("--folder", help="where every stage keeps its result")] = Path(
        "tiger-runs/demo"
    ),
    port: Annotated[int, typer.Option("--port", help="port of the endpoint on 127.0.0.1; 0 takes a free one")] = 8000,
) -> None:
    """Tell the whole story here: text, base, sweep, two experts, heads, one endpoint with a dial. Example: tiger demo --exit --port 0"""
    from tigerbot_jobs.demo.story import Demo

    raise SystemExit(Demo(folder=folder, model=model, port=port).tell(exit_after=exit_after, fresh=fresh))


@nodes_app.callback(invoke_without_command=True)
def nodes(context: typer.Context, folder: Folder = RUNS) -> None:
    """List the faults of nodes, and which nodes are kept out until when. Example: tiger nodes --in tiger-runs"""
    if context.invoked_subcommand is not None:
        return
    from tigerbot_jobs.train.watch.quarantine import node_lines, quarantine_of

    for line in node_lines(quarantine_of(folder)) or [f"no node has failed in {folder}"]:
        print(line)


@nodes_app.command()
def clear(node: str, folder: Folder = RUNS) -> None:
    """Let a node in again; its faults so far count no more. Example: tiger nodes clear node-7"""
    from tigerbot_jobs.train.watch.quarantine import quarantine_of

    was_out = quarantine_of(folder).clear(node)
    print(f"{node} is in again" if was_out else f"{node} was not kept out; its faults so far count no more")


@nodes_app.command()
def quarantine(
    node: str,
    hours: Annotated[float, typer.Option("--hours", metavar="H", help="for how long")],
    folder: Folder = RUNS,
) -> None:
    """Place nothing on a node for some hours. Example: tiger nodes quarantine node-7 --hours 24"""
    from tigerbot_jobs.train.watch.quarantine import quarantine_of

    print(quarantine_of(folder).hold(node, hours).line())


def goodput(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's name, its folder, or a ledger.jsonl")],
    folder: Annotated[Path, typer.Option("--in", metavar="FOLDER", help="a storage folder")] = Path("tiger-runs"),
    as_json: Annotated[bool, typer.Option("--json", help="everything, for programs")] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page with the pictures")] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="of a card for an hour; else what the run's spec said")
    ] = None,
) -> None:
    """Say where each second of a training run went and what it cost, also while it runs. Example: tiger goodput pretrain --html goodput.html"""
    from tigerbot_jobs.train import goodput_text

    ledger = goodput_text.find_ledger(run, folder)
    account, state = goodput_text.read_account(ledger, price)
    if page is not None:
        from tigerbot_jobs.train.goodput_page import write_page

        print(f"wrote {write_page(page, account, state, ledger.with_name('metrics.jsonl'))}")
    elif as_json:
        import json

        print(json.dumps(goodput_text.as_json(account, state), indent=2, ensure_ascii=False))
    else:
        for line in goodput_text.table(account, state):
            print(line.rstrip())


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a training run's name, or its folder")],
    folder: Folder = RUNS,
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="from the newest checkpoint of at most this step; else the newest"),
    ] = None,
) -> None:
    """Do one step of a run twice on this machine and compare the bits. Example: tiger replay pretrain --step 4000"""
    from tigerbot_jobs.train.again import replay_step

    found = replay_step(run, folder, step)
    print(found.line())
    raise SystemExit(0 if found.found.matches else 1)


def report(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="a sweep's name, its folder, or a trials.jsonl")],
    folder: Folder = RUNS,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="where to write the page; else report.html beside the sweep"),
    ] = None,
) -> None:
    """Write a sweep's page, what to do next and why, and log it to MLflow; also while it runs. Example: tiger report town-sweep --html report.html"""
    from tigerbot_jobs.sweep import page_report

    journal = page_report.find_journal(sweep, folder)
    for line in page_report.lines(journal):
        print(line)
    written = page_report.write_report(journal, page)
    print(f"wrote {written}")
    print(page_report.log_report(written, journal))


def simulate(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="a YAML spec of kind simulate")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a field; repeatable")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="begin anew under this name; the old result is kept aside")
    ] = False,
) -> None:
    """Predict the goodput of a long run on many cards, and what to buy. Example: tiger simulate jobs/simulate.yaml"""
    from tigerbot.errors import InputError
    from tigerbot.runner import run_spec
    from tigerbot.spec import load_spec
    from tigerbot_jobs.simulate.tables import result_lines

    loaded = load_spec(spec, overrides or [])
    if loaded.kind != "simulate":
        raise InputError(f"is a spec of kind {loaded.kind}", where=str(spec), fix="give one of kind simulate")
    for line in result_lines(run_spec(loaded, replace=replace)):
        print(line)
