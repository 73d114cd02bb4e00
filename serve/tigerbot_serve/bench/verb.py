"""The verb `tiger bench`: its options, checked and made into a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tigerbot_serve.bench.plan import Plan
    from tigerbot_serve.bench.report import Report

Url = Annotated[str, typer.Argument(metavar="URL", help="a server, e.g. http://127.0.0.1:8000")]
Clients = Annotated[
    int | None, typer.Option("--clients", "-c", min=1, max=4096, help="closed loop: so many ask at once [4]")
]
Rate = Annotated[
    float | None, typer.Option("--rate", "-r", min=0.001, max=100_000, help="open loop: arrivals a second, Poisson")
]
Duration = Annotated[float | None, typer.Option("--duration", "-d", min=0.1, max=3600, help="seconds of sending [10]")]
Requests = Annotated[
    int | None, typer.Option("--requests", "-n", min=1, max=1_000_000, help="so many requests, then stop")
]
Stream = Annotated[bool, typer.Option("--stream/--no-stream")]
Endpoint = Annotated[str, typer.Option("--endpoint", help="chat or completions")]
Model = Annotated[str, typer.Option("--model")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1)]
Creativity = Annotated[
    float | None, typer.Option("--creativity", min=0, max=1, help="the dial; not sent where it is not given")
]
Fields = Annotated[
    list[str] | None, typer.Option("--field", metavar="NAME=JSON", help="a field of the body; null drops one")
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", metavar="JSONL", help="`prompt` or `messages` a line; else built in")
]
KeyEnv = Annotated[str, typer.Option("--key-env", help="the variable that holds the key")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, max=3600, help="seconds for one answer")]
MaxInFlight = Annotated[int, typer.Option("--max-in-flight", min=1, max=16_384, help="connections of an open loop")]
Seed = Annotated[int, typer.Option("--seed", help="of the arrivals")]
Processes = Annotated[int, typer.Option("--processes", min=1, max=64, help="share the load out")]
Out = Annotated[Path | None, typer.Option("--out", metavar="JSON", help="also write the numbers here")]


def bench(
    url: Url,
    clients: Clients = None,
    rate: Rate = None,
    duration: Duration = None,
    requests: Requests = None,
    stream: Stream = True,
    endpoint: Endpoint = "chat",
    model: Model = "tiger",
    max_tokens: MaxTokens = 64,
    creativity: Creativity = None,
    field: Fields = None,
    prompts: Prompts = None,
    key_env: KeyEnv = "TIGER_API_KEY",
    timeout: Timeout = 120.0,
    max_in_flight: MaxInFlight = 512,
    seed: Seed = 0,
    processes: Processes = 1,
    out: Out = None,
) -> None:
    """Measure an OpenAI-compatible endpoint: times to first event, first token and end, throughput, errors.
    Example: tiger bench http://127.0.0.1:8000 --clients 8 --duration 20 --out bench.json"""
    from tigerbot_serve.bench import plan as plans
    from tigerbot_serve.bench.fleet import measure

    _check(clients, rate, endpoint)
    fields = {"creativity": creativity} | plans.extra_fields(field or [])
    asked = plans.read_prompts(prompts, endpoint) if prompts else plans.PROMPTS
    plan = plans.Plan(
        url=plans.target(url, endpoint),
        bodies=plans.body_texts(endpoint, asked, model=model, stream=stream, max_tokens=max_tokens, fields=fields),
        clients=0 if rate is not None else clients or 4,
        rate=rate or 0.0,
        duration_s=duration or (plans.MAX_DURATION_S if requests else 10.0),
        requests=requests or plans.MAX_REQUESTS,
        timeout_s=timeout,
        max_in_flight=max_in_flight,
        stream=stream,
        seed=seed,
        headers=plans.key_headers(key_env),
    )
    _check_shares(plan, processes)
    _tell(measure(plan, processes), plan, out)


def _check(clients: int | None, rate: float | None, endpoint: str) -> None:
    from tigerbot.errors import InputError
    from tigerbot_serve.bench.plan import PATHS

    if clients is not None and rate is not None:
        raise InputError("are two kinds of load", where="--clients, --rate", fix="give one of them")
    if endpoint not in PATHS:
        raise InputError("wants chat or completions", where=f"--endpoint {endpoint}", fix="use one of them")


def _check_shares(plan: Plan, processes: int) -> None:
    from tigerbot.errors import InputError

    if plan.loop == "closed" and plan.clients < processes:
        raise InputError(f"{plan.clients} clients", where=f"--processes {processes}", fix="give each process a client")


def _tell(found: Report, plan: Plan, out: Path | None) -> None:
    import json

    from tigerbot.errors import ServeError
    from tigerbot_serve.bench.report import lines

    print("\n".join(lines(found)), flush=True)
    if out is not None:
        out.write_text(json.dumps(found.json(), indent=1) + "\n", encoding="utf-8")
    if not found.good:
        raise ServeError("gave no whole answer", where=plan.url, fix="its errors are above")
