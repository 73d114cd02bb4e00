"""The job behind `tiger serve`: deploy, then stay and keep the endpoint until it is stopped.

Staying is short rounds of looking: was an update handed over, has another process taken the name. What the rounds know
is in the run's folder, where `tiger status` reads it.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from tigerbot.errors import TigerError
from tigerbot.living import ENDPOINT
from tigerbot.runs import Run, write_json
from tigerbot.spec import ServeSpec
from tigerbot_serve.deploy.endpoint import Endpoint, deploy
from tigerbot_serve.deploy.handover import forget, take_update
from tigerbot_serve.deploy.watch import CanaryWatch
from tigerbot_serve.scale.aliases import Follower

ROUND_S = 0.5


def run(run: Run) -> dict[str, Any]:
    """Deploy and stay until Ctrl-C or SIGTERM."""
    spec = run.spec
    assert isinstance(spec, ServeSpec)
    forget(run.folder)
    endpoint = deploy(spec, folder=run.folder)
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        for line in endpoint.lacks:
            print(f"warning: {line}", flush=True)
        print(f"chat page  {endpoint.url}/\nAPI        {endpoint.url}/v1\nCtrl-C stops it.", flush=True)
        _stay(run, endpoint, ended)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        (run.folder / ENDPOINT).unlink(missing_ok=True)
        endpoint.stop()
    return run.finish({"url": endpoint.url})


def _stay(run: Run, endpoint: Endpoint, ended: threading.Event) -> None:
    assert isinstance(run.spec, ServeSpec)
    follower, told = Follower(run.spec), ""
    watch = CanaryWatch(endpoint, run.folder)
    shown: dict[str, Any] = {}

    def update(spec: ServeSpec) -> str:
        nonlocal follower
        said = endpoint.update(spec)
        run.become(spec)
        follower.close()
        follower = Follower(spec)
        return said

    try:
        while not ended.wait(ROUND_S):
            said = take_update(run.folder, update)
            if said is None and follower.moved():
                said = _followed(endpoint, run.spec)
            if said is None and follower.trouble != told:
                told = follower.trouble
                said = f"aliases are not followed: {told}" if told else "aliases are followed again"
            for line in filter(None, (said, watch.look())):
                print(line, flush=True)
            if endpoint.taken_over:
                print("another `tiger serve` has this endpoint now; it goes on there", flush=True)
                return
            note = ", ".join(filter(None, (f"{endpoint.replicas} replicas", watch.note)))
            if shown != (shown := {"url": endpoint.url, "note": note}):
                write_json(run.folder / ENDPOINT, shown)
    finally:
        follower.close()


def _followed(endpoint: Endpoint, spec: Any) -> str:
    """Serve what an alias points at now; what cannot be served waits for the alias to move again."""
    try:
        return f"an alias moved: {endpoint.update(spec)}"
    except TigerError as error:
        return f"an alias moved to what cannot be served, the old version serves on: {error}"
