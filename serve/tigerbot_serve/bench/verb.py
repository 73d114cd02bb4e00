"""The verb `tiger bench`: its options, checked and made into a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="a server, e.g. http://127.0.0.1:8000")],
    clients: Annotated[
        int | None, typer.Option("--clients", "-c", min=1, max=4096, help="closed loop: so many ask at once [4]")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", "-r", min=0.001, max=100_000, help="open loop: arrivals a second, Poisson")
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", "-d", min=0.1, max=3600, help="seconds of sending [10]")
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", min=1, max=1_000_000, help="so many requests, then stop")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream")] = True,
    endpoint: Annotated[str, typer.Option("--endpoint", help="chat or completions")] = "chat",
    model: Annotated[str, typer.Option("--model")] = "tiger",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 64,
    creativity: Annotated[
        float | None, typer.Option("--creativity", min=0, max=1, help="the dial; not sent where it is not given")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", metavar="NAME=JSON", help="a field of the body; null drops one")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="JSONL", help="`prompt` or `messages` a line; else built in")
    ] = None,
    key_env: Annotated[str, typer.Option("--key-env", help="the variable that holds the key")] = "TIGER_API_KEY",
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=3600, help="seconds for one answer")] = 120.0,
    max_in_flight: Annotated[
        int, typer.Option("--max-in-flight", min=1, max=16_384, help="connections of an open loop")
    ] = 512,
    seed: Annotated[int, typer.Option("--seed", help="of the arrivals")] = 0,
    processes: Annotated[int, typer.Option("--processes", min=1, max=64, help="share the load out")] = 1,
    out: Annotated[Path | None, typer.Option("--out", metavar="JSON", help="also write the numbers here")] = None,
) -> None:
    """Measure an OpenAI-compatible endpoint: times to first event, first token and end, throughput, errors.
    Example: tiger bench http://127.0.0.1:8000 --clients 8 --duration 20 --out bench.json"""
    import json

    from tigerbot.errors import InputError, ServeError
    from tigerbot_serve.bench import plan as plans
    from tigerbot_serve.bench.fleet import measure
    from tigerbot_serve.bench.report import lines

    if clients is not None and rate is not None:
        raise InputError("are two kinds of load", where="--clients, --rate", fix="give one of them")
    if endpoint not in plans.PATHS:
        raise InputError("wants chat or completions", where=f"--endpoint {endpoint}", fix="use one of them")
    if duration is None:
        duration = plans.MAX_DURATION_S if requests else 10.0
    fields = {"creativity": creativity} | plans.extra_fields(field or [])
    asked = plans.read_prompts(prompts, endpoint) if prompts else plans.PROMPTS
    plan = plans.Plan(
        url=plans.target(url, endpoint),
        bodies=plans.body_texts(endpoint, asked, model=model, stream=stream, max_tokens=max_tokens, fields=fields),
        clients=0 if rate is not None else clients or 4,
        rate=rate or 0.0,
        duration_s=duration,
        requests=requests or plans.MAX_REQUESTS,
        timeout_s=timeout,
        max_in_flight=max_in_flight,
        stream=stream,
        seed=seed,
        headers=plans.key_headers(key_env),
    )
    if rate is None and plan.clients < processes:
        raise InputError(f"{plan.clients} clients", where=f"--processes {processes}", fix="give each process a client")
    found = measure(plan, processes)
    print("\n".join(lines(found)), flush=True)
    if out is not None:
        out.write_text(json.dumps(found.json(), indent=1) + "\n", encoding="utf-8")
    if not found.good:
        raise ServeError("gave no whole answer", where=plan.url, fix="its errors are above")
