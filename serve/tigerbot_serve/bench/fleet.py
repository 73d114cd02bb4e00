"""A run in this process, or shared out over several: one core sends a few thousand requests a second.

A worker is told its plan on its standard input, begins at the word "go", and stops when its input is closed, so that
none outlives the process that started it. This module is also the worker: `python -m tigerbot_serve.bench.fleet`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

from tigerbot.errors import ServeError
from tigerbot_serve.bench.load import Load
from tigerbot_serve.bench.plan import Plan
from tigerbot_serve.bench.reading import Sample
from tigerbot_serve.bench.report import Report, report
from tigerbot_serve.bench.wire import Pool


def measure(plan: Plan, processes: int = 1) -> Report:
    """Run a plan. Ctrl-C ends it early, with what has been measured.

    Raises:
        ServeError: nothing listens there, or a worker process failed.
    """
    _run(_reach(plan))
    samples, unfinished = _here(plan) if processes == 1 else _shared(plan, processes)
    return report(plan, samples, unfinished)


async def _reach(plan: Plan) -> None:
    pool = Pool(plan.url)
    try:
        async with asyncio.timeout(min(10.0, plan.timeout_s)):
            (await pool.take()).close()
    except (OSError, TimeoutError) as error:
        why = f"cannot be reached ({type(error).__name__})"
        raise ServeError(why, where=plan.url, fix="is it running, is the address right?") from None


def _here(plan: Plan, *, until_eof: bool = False) -> tuple[list[Sample], int]:
    load = Load(plan)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        if until_eof:
            threading.Thread(target=_stop_at_eof, args=(loop, load), daemon=True).start()
        elif threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGINT, load.stop)
        await load.run()

    _run(run())
    return load.samples, load.unfinished


def _shared(plan: Plan, processes: int) -> tuple[list[Sample], int]:
    command = [sys.executable, "-m", "tigerbot_serve.bench.fleet"]
    workers = [
        # A session of its own: Ctrl-C on the terminal reaches this process, which tells the workers.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, bufsize=1
        )
        for _ in range(processes)
    ]
    try:
        for index, worker in enumerate(workers):
            _tell(worker, json.dumps(asdict(plan.share(index, processes))))
        for worker in workers:
            _hear(worker)
        for worker in workers:
            _tell(worker, "go")
        found = [json.loads(line) for line in _results(workers)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    samples = sorted((Sample(*row) for one in found for row in one["samples"]), key=lambda sample: sample.end)
    return samples, sum(one["unfinished"] for one in found)


def _results(workers: list[subprocess.Popen[str]]) -> list[str]:
    """Every worker's last line; Ctrl-C makes them give it now."""
    lines: list[str] = []
    while len(lines) < len(workers):
        try:
            lines.append(_hear(workers[len(lines)]))
        except KeyboardInterrupt:
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.close()
    return lines


def _tell(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(f"{line}\n")
        worker.stdin.flush()
    except BrokenPipeError:
        raise _dead() from None


def _hear(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise _dead()
    return line


def _dead() -> ServeError:
    return ServeError("a worker process died", where="bench", fix="its error is above; try --processes 1")


def _stop_at_eof(loop: asyncio.AbstractEventLoop, load: Load) -> None:
    sys.stdin.read()
    loop.call_soon_threadsafe(load.stop)


def _run(work: Any) -> None:
    """uvloop costs half of what asyncio's own loop does for the same requests."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def _worker() -> None:
    raw = json.loads(sys.stdin.readline())
    raw |= {"bodies": tuple(raw["bodies"]), "headers": tuple(tuple(pair) for pair in raw["headers"])}
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "go":
        return
    samples, unfinished = _here(Plan(**raw), until_eof=True)
    print(json.dumps({"samples": samples, "unfinished": unfinished}), flush=True)


if __name__ == "__main__":
    _worker()
