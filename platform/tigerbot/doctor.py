"""What this machine has, what is missing, what to do: one finding a line, in a few seconds.

Heavy packages are looked up, not imported; only Ray is, because a broken Ray is what everything else trips over.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tigerbot.errors import ClusterError
from tigerbot.ports import is_free
from tigerbot.ray_auth import auth_mode, find_token
from tigerbot.spec import ServeSpec, load_spec

GIB = 1024**3
PORTS = {8000: "serving", 8265: "Ray's dashboard"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PYTHON = (3, 11)


@dataclass(frozen=True)
class Finding:
    """`FAIL`: nothing works before it is put right. `warn`: something does not, or not well."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.level:<4} {self.what}: {self.fix}" if self.fix else f"{self.level:<4} {self.what}"


def examine(spec: Path | None = None) -> list[Finding]:
    """Look at this machine, and at the address a serve spec wants to listen on.

    Raises:
        SpecError: the spec is wrong.
    """
    host = _serving_host(spec)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        python,
        machine,
        ports,
        gpu,
        ray,
        compiler,
        mlflow,
        s3,
        lambda: serving(host),
    )
    return [finding for check in checks for finding in check()]


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == _PYTHON:
        yield Finding("ok", f"Python {version}")
    else:
        yield Finding("FAIL", f"Python {version}, wants 3.11", "make setup PYTHON=python3.11")


def machine() -> Iterator[Finding]:
    """Cores and memory this process may use, and free disk here and where Ray spills."""
    cores = len(os.sched_getaffinity(0))
    yield (
        Finding("ok", f"{cores} cores")
        if cores > 1
        else Finding("warn", "1 core", "the demo is slow with fewer than 2")
    )
    available = psutil.virtual_memory().available / GIB
    memory = f"{available:.1f} GiB of memory free"
    if available >= 6:
        yield Finding("ok", memory)
    else:
        yield Finding("warn" if available >= 2 else "FAIL", memory, "close what else runs; the demo wants 6 GiB")
    for folder in (Path.cwd(), Path("/tmp")):
        usage = shutil.disk_usage(folder)
        free = f"{usage.free / GIB:.0f} GiB of disk free in {folder}"
        if usage.free < 2 * GIB:
            yield Finding("FAIL", free, "free space: checkpoints and Ray's object store need it")
        elif usage.free < 0.05 * usage.total or usage.free < 10 * GIB:
            # Ray stops spilling objects on a disk that is 95% full.
            yield Finding("warn", free, "free space: Ray wants 5% of the disk, a training run 10 GiB")
        else:
            yield Finding("ok", free)


def ports(wanted: Mapping[int, str] = PORTS) -> Iterator[Finding]:
    for port, purpose in wanted.items():
        if is_free(port):
            yield Finding("ok", f"port {port} ({purpose}) is free")
        else:
            yield Finding("warn", f"port {port} ({purpose}) is taken", f"see who: ss -ltnp 'sport = :{port}'")


def gpu() -> Iterator[Finding]:
    torch = _version("torch")
    if torch is None:
        yield Finding("FAIL", "torch is not installed", "make setup")
        return
    names = _gpu_names()
    if not names:
        yield Finding("ok", f"torch {torch}, no GPU: everything runs on the CPU, slowly for models above 60m")
    elif "+cpu" in torch:
        fix = f".venv/bin/pip install --force-reinstall torch=={torch.partition('+')[0]}"
        yield Finding("warn", f"{len(names)} x {names[0]}, but torch {torch} is for CPUs", fix)
    else:
        yield Finding("ok", f"torch {torch}, {len(names)} x {names[0]}")


def ray() -> Iterator[Finding]:
    version = _version("ray")
    if version is None:
        yield Finding("FAIL", "Ray is not installed", "make setup")
        return
    try:
        import ray as _ray  # noqa: F401 - whether it imports is the question
    except Exception as error:  # whatever a broken installation raises
        yield Finding("FAIL", f"Ray {version} does not import ({error})", "make setup")
        return
    yield Finding("ok", f"Ray {version}")
    try:
        token, mode = find_token(), auth_mode()
    except ClusterError as error:
        yield Finding("FAIL", f"{error.where} {error.what}", error.fix)
        return
    if mode == "disabled":
        fix = "unset RAY_AUTH_MODE: whoever reaches the cluster's ports can run code on it"
        yield Finding("warn", "Ray's token authentication is disabled", fix)
    elif token is not None:
        yield Finding("ok", f"Ray's token authentication is on ({token.source})")
    elif mode == "token":
        yield Finding("warn", "RAY_AUTH_MODE=token, but there is no token", "ray get-auth-token --generate")
    else:
        yield Finding("ok", "Ray's token authentication: a token is made when a cluster first starts")


def compiler() -> Iterator[Finding]:
    deepspeed = _version("deepspeed")
    if deepspeed is None:
        yield Finding("FAIL", "DeepSpeed is not installed", "make setup")
        return
    found = {name: shutil.which(name, path=_path()) for name in ("g++", "ninja")}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        fix = "apt-get install g++ ninja-build: DeepSpeed compiles one op when training first starts"
        yield Finding("FAIL", f"DeepSpeed {deepspeed}, but no {' and no '.join(missing)}", fix)
    else:
        yield Finding("ok", f"DeepSpeed {deepspeed}, g++ and ninja")


def mlflow() -> Iterator[Finding]:
    version = _version("mlflow")
    yield Finding("ok", f"MLflow {version}") if version else Finding("FAIL", "MLflow is not installed", "make setup")


def s3() -> Iterator[Finding]:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    have = [name for name in names if os.environ.get(name)]
    profile = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS itself")
    if len(have) == len(names):
        yield Finding("ok", f"S3 credentials in the environment, for {endpoint}")
    elif have:
        missing = next(name for name in names if name not in have)
        yield Finding("warn", f"S3: {have[0]} is set, {missing} is not", "set both")
    elif profile.exists() or os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        yield Finding("ok", f"S3 credentials from a profile or a service account, for {endpoint}")
    else:
        yield Finding("warn", "no S3 credentials", f"set {' and '.join(names)} before you use s3:// storage")


def serving(host: str) -> Iterator[Finding]:
    """What an endpoint opens. Behind a host of its own it stands behind HAProxy, whose replicas listen everywhere."""
    if host in LOOPBACK:
        yield Finding("ok", "serving listens on this machine only")
        return
    low = os.environ.get("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "30000")
    high = os.environ.get("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", "31000")
    yield Finding(
        "warn",
        f"serving on {host} opens port 8000, and behind HAProxy, on all interfaces, every replica ({low}-{high}), Serve's "
        f"own proxy (8500), HAProxy's statistics ({_haproxy('STATS', 8404)}) and metrics ({_haproxy('METRICS', 9101)})",
        "close these ports to the outside in your firewall, and set API keys",
    )


def _haproxy(page: str, port: int) -> str:
    return os.environ.get(f"RAY_SERVE_HAPROXY_{page}_PORT", str(port))


def _serving_host(spec: Path | None) -> str:
    loaded = load_spec(spec) if spec else None
    if isinstance(loaded, ServeSpec):
        return loaded.http.host
    set_host = os.environ.get("RAY_SERVE_DEFAULT_HTTP_HOST", "")
    if set_host:
        return set_host
    return "0.0.0.0" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "127.0.0.1"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _path() -> str:
    """PATH with this environment's own programs first: `pip install ninja` puts one there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
