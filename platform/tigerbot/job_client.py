"""Ray's job client, bounded in time, and what goes wrong with it as one line each.

Ray's own client waits for ever on a dashboard that hangs, and lets `RAY_ADDRESS` override the address it is given:
both are put right here. The log of a living job is followed over its websocket and taken up again after a cut.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from tigerbot.errors import ClusterError, InputError, TigerError, first_line
from tigerbot.ray_auth import find_token

REQUEST_TIMEOUT_S = 60.0
FRUITLESS_TAILS = 10
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def job_client(cluster: str) -> Any:
    """A client of the Jobs API at `http://host:8265`; the connection, its version and the token are checked.

    Raises:
        InputError: not such an address.
        ClusterError: nothing answers there, or it refuses the token.
    """
    if not cluster.startswith(("http://", "https://")):
        raise InputError(
            f"got {cluster!r}, wants the dashboard's address", where="--cluster", fix="e.g. http://127.0.0.1:8265"
        )
    token = find_token()
    with cluster_errors(cluster), _without(_OVERRIDING):
        return _client_class()(cluster, headers=token.headers if token else None)


@contextmanager
def cluster_errors(cluster: str) -> Iterator[None]:
    """What Ray's client raises, as one `ClusterError` or `InputError` line."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except TigerError:
        raise
    except AuthenticationError:
        raise _unauthorized(cluster) from None
    except (requests.exceptions.Timeout, TimeoutError):
        raise ClusterError("does not answer in time", where=cluster, fix="look at the head node's load") from None
    except (requests.exceptions.JSONDecodeError, KeyError):
        raise ClusterError("is not a Ray dashboard", where=cluster, fix="give the dashboard's address") from None
    except (ConnectionError, requests.exceptions.ConnectionError, aiohttp.ClientConnectionError):
        fix = "check the address; `tiger doctor` on the head node shows whether Ray's dashboard is up"
        raise ClusterError("nothing answers here", where=cluster, fix=fix) from None
    except (requests.exceptions.RequestException, aiohttp.ClientError) as error:
        raise ClusterError(first_line(error), where=cluster, fix="give the dashboard's address") from None
    except ValueError as error:
        if "exceeds the maximum size" not in str(error):
            raise
        fix = "name large files in .gitignore or .rayignore, and put them in storage"
        raise InputError(f"the folder is too large to travel ({first_line(error)})", where=".", fix=fix) from None
    except RuntimeError as error:
        raise ClusterError(first_line(error), where=cluster, fix="see `tiger jobs`") from None


def follow_log(client: Any, cluster: str, job_id: str) -> Iterator[str]:
    """The log of a job from its beginning, as it is written, until the job ends.

    Raises:
        ClusterError: the cluster went away, or lets nobody read this log.
    """
    read, fruitless = 0, 0
    with asyncio.Runner() as runner:
        while True:
            position, cut = 0, None
            try:
                for piece in _tail(client, cluster, job_id, runner):
                    new = piece[max(0, read - position) :]
                    position += len(piece)
                    read = max(read, position)
                    fruitless = 0
                    if new:
                        yield new
            except ClusterError as error:
                cut = error
                fruitless += 1
            with cluster_errors(cluster):
                ended = client.get_job_status(job_id).is_terminal()
            if cut and fruitless >= FRUITLESS_TAILS:
                raise cut
            if ended and not cut:
                return
            runner.run(asyncio.sleep(1.0))


def _tail(client: Any, cluster: str, job_id: str, runner: asyncio.Runner) -> Iterator[str]:
    """One websocket's worth of a log: each begins at the log's beginning."""
    pieces = client.tail_job_logs(job_id)
    while True:
        with cluster_errors(cluster):
            piece = runner.run(_next(pieces))
        if piece is None:
            return
        yield piece


async def _next(pieces: Any) -> str | None:
    return await anext(pieces, None)


@lru_cache(maxsize=1)
def _client_class() -> Any:
    from ray.job_submission import JobSubmissionClient

    # What Ray logs about packing the folder is no message to a person.
    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class BoundedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_S, **arguments)

    return BoundedClient


def _unauthorized(cluster: str) -> ClusterError:
    fix = "set RAY_AUTH_TOKEN, or write ~/.ray/auth_token, with what `ray get-auth-token` says on the head node"
    token = find_token()
    what = f"refuses the token in {token.source}" if token else "wants a token"
    return ClusterError(what, where=cluster, fix=fix)


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
