"""Jobs on a real cluster of its own: a name and a spec run once, strangers are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

TOKEN = "0123456789abcdef0123456789abcdef"
TIGER = "import tigerbot.cli as c, tigerbot.verbs_cluster as v; v.register(c.app); c.main()"
IMPATIENT = "import tigerbot.job_client as j; j.REQUEST_TIMEOUT_S = 1.0"


@dataclass(frozen=True)
class Head:
    """A cluster, and the folder its submitters stand in."""

    url: str
    env: dict[str, str]
    folder: Path

    def tiger(self, *words: str, url: str = "", first: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """`tiger WORDS --cluster URL`, after the statement `first`."""
        command = self.command(*words, url=url, first=first)
        return subprocess.run(command, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=120)

    def command(self, *words: str, url: str = "", first: str = "") -> list[str]:
        return [sys.executable, "-c", f"{first}\n{TIGER}", *words, "--cluster", url or self.url]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = _working_folder(tmp_path_factory.mktemp("work"))
    scratch = Path(tempfile.mkdtemp(prefix="tj", dir="/tmp"))  # Ray's sockets need a short path
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TIGER_"))}
    env |= {
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    port, dashboard, client, agent, grpc, metrics = _free_ports(6)
    words = f"--port {port} --dashboard-port {dashboard} --ray-client-server-port {client} --num-cpus 2 "
    words += (
        f"--dashboard-agent-listen-port {agent} --dashboard-agent-grpc-port {grpc} --metrics-export-port {metrics} "
    )
    words += "--min-worker-port 0 --max-worker-port 0 --object-store-memory 150000000 --dashboard-host 127.0.0.1 "
    words += f"--temp-dir {scratch}/r --node-ip-address 127.0.0.1 --disable-usage-stats"
    with (scratch / "log").open("w") as log:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words.split()]
        started = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_dashboard(f"http://127.0.0.1:{dashboard}", started, scratch / "log")
        yield Head(f"http://127.0.0.1:{dashboard}", env, folder)
    finally:
        _end(started)
        shutil.rmtree(scratch, ignore_errors=True)


def _working_folder(folder: Path) -> Path:
    rows = [{"text": text} for text in ("你好，世界。", "hello world", "老虎在山里走。", "a tiger walks", "数据 data")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = "sources: [{name: rows, path: rows.jsonl}]\ntokenizer: {vocab_size: 512}\nsequence_length: 16\n"
    (folder / "small.yaml").write_text(f"kind: corpus\nname: small\nstorage: {{uri: {folder}/runs}}\n{source}")
    world = "sources: [{name: facts, world: facts}, {name: stories, world: stories}]\ntokenizer: {vocab_size: 4096}\n"
    (folder / "long.yaml").write_text(f"kind: corpus\nname: long\nstorage: {{uri: {folder}/runs}}\n{world}")
    (folder / "relative.yaml").write_text(f"kind: corpus\nname: relative\n{source}")
    (folder / ".git").mkdir()
    (folder / ".git/large").write_bytes(bytes(1000))
    return folder


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _wait_for_dashboard(url: str, started: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and started.poll() is None:
        try:
            if httpx.get(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the cluster did not start: {log.read_text()[-2000:]}")


def _end(started: subprocess.Popen) -> None:
    family = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
    os.killpg(started.pid, signal.SIGKILL)
    started.wait(15)
    for process in family:
        if process.is_running():
            process.kill()


class Relay:
    """A TCP relay whose connections can be cut; `cuts` counts those that were."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port, self.cuts = upstream_port, 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.upstream_port))
            self._open += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, target), daemon=True).start()

    def cut(self) -> None:
        alive, self._open = self._open, []
        for end in alive:
            try:
                end.shutdown(socket.SHUT_RDWR)
                self.cuts += 1
            except OSError:
                continue  # ended by itself

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return  # cut


def wait_for_end(head: Head, job: str) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        line = next(line for line in head.tiger("jobs").stdout.splitlines() if line.startswith(job))
        if not {"PENDING", "RUNNING"} & set(line.split()):
            return line
        time.sleep(1)
    raise AssertionError(f"{job} did not end: {line}")


def test_a_job_runs_once_however_often_it_is_submitted_and_its_log_survives_cuts(head: Head) -> None:
    relay = Relay(int(head.url.rpartition(":")[2]))
    try:
        first = head.tiger("submit", "small.yaml")
        command = head.command("logs", "small", "-f", url=f"http://127.0.0.1:{relay.port}")
        following = subprocess.Popen(command, cwd=head.folder, env=head.env, stdout=subprocess.PIPE, text=True)
        for _ in range(4):
            time.sleep(1.5)
            relay.cut()
        followed, _ = following.communicate(timeout=120)
    finally:
        relay.close()
    again = head.tiger("submit", "small.yaml")
    log = head.tiger("logs", "small").stdout
    listed = head.tiger("jobs").stdout.splitlines()

    job = first.stdout.split()[0]
    assert first.returncode == 0 and job.startswith("small-") and f"tiger logs {job} -f" in first.stdout, first.stderr
    *lines, last = followed.splitlines(keepends=True)
    assert following.returncode == 0 and relay.cuts >= 1 and last.startswith(f"{job}  SUCCEEDED")
    assert "".join(lines) == log and log.count("> packing tokens") == 1
    assert again.returncode == 0 and again.stdout.startswith(f"{job}  SUCCEEDED")
    assert "(submitted before)" in again.stdout and len([line for line in listed if line.startswith("small")]) == 1
    assert (head.folder / "runs/small/tokens/rows/manifest.json").exists()
    assert first.stderr == again.stderr == ""


def test_another_spec_under_a_living_name_is_refused_and_replace_stops_the_old_one(head: Head) -> None:
    first = head.tiger("submit", "long.yaml")
    same = head.tiger("submit", "long.yaml")
    other = head.tiger("submit", "long.yaml", "--set", "sequence_length=64")
    replaced = head.tiger("submit", "long.yaml", "--set", "sequence_length=64", "--replace")
    ended = wait_for_end(head, first.stdout.split()[0])
    stopped = head.tiger("stop", "long")
    resumed = head.tiger("submit", "long.yaml", "--set", "sequence_length=64")
    head.tiger("stop", "long")

    job, new = first.stdout.split()[0], replaced.stdout.split()[0]
    assert same.stdout.split()[0] == job and "(submitted before)" in same.stdout
    assert other.returncode == 2 and other.stdout == "" and len(other.stderr.splitlines()) == 1
    assert "with another spec (sequence_length: 512 -> 64)" in other.stderr and "--replace" in other.stderr
    assert replaced.returncode == 0 and new != job and "submitted before" not in replaced.stdout, replaced.stderr
    assert "STOPPED" in ended and stopped.stdout.split()[:2] == [new, "STOPPED"]
    assert resumed.stdout.split()[0] == f"{new}-2"


def test_two_submitters_at_once_start_one_job(head: Head) -> None:
    words = ("submit", "small.yaml", "--set", "name=both")
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(head.command(*words), cwd=head.folder, env=head.env, stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    answers = [one.communicate(timeout=120) for one in both]
    head.tiger("stop", "both")

    assert [one.returncode for one in both] == [0, 0], answers
    assert len({out.split()[0] for out, _ in answers}) == 1
    assert sorted("(submitted before)" in out for out, _ in answers) == [False, True], answers


def test_a_job_that_fails_says_why_and_ends_with_1(head: Head) -> None:
    submitted = head.tiger("submit", "small.yaml", "--set", "name=bad", "--set", "sources.0.path=nothing.jsonl")
    followed = head.tiger("logs", submitted.stdout.split()[0], "-f")

    assert followed.returncode == 1 and "nothing.jsonl: no such file" in followed.stdout
    assert "the job failed" in followed.stderr and "Traceback" not in followed.stderr + followed.stdout


def test_strangers_and_mistakes_are_one_line(head: Head, tmp_path: Path) -> None:
    (free,) = _free_ports(1)
    outside = tmp_path / "outside.yaml"
    outside.write_text((head.folder / "small.yaml").read_text())
    with socket.create_server(("127.0.0.1", 0)) as deaf, ThreadPoolExecutor(4) as pool:
        silent = f"127.0.0.1:{deaf.getsockname()[1]}"

        def tiger(*words: str, **options: str) -> Future[subprocess.CompletedProcess[str]]:
            return pool.submit(head.tiger, *words, **options)

        wrong_token = tiger("jobs", RAY_AUTH_TOKEN="f" * 32)
        no_token = tiger("jobs", RAY_AUTH_TOKEN="", HOME=str(tmp_path))
        no_mode = tiger("jobs", RAY_AUTH_MODE="")
        overridden = tiger("jobs", RAY_ADDRESS="http://127.0.0.1:9")
        nobody = tiger("submit", "small.yaml", url=f"http://127.0.0.1:{free}")
        no_scheme = tiger("jobs", url=silent)
        hangs = tiger("jobs", url=f"http://{silent}", first=IMPATIENT)
        lost = tiger("submit", "relative.yaml")
        strange = tiger("submit", str(outside))
        unknown = tiger("stop", "nothing")

    expected = {
        1: [
            (wrong_token, "refuses the token in RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN"),
            (no_token, "wants a token; set RAY_AUTH_TOKEN"),
            (nobody, "nothing answers here; check the address"),
            (hangs, "does not answer in time"),
        ],
        2: [
            (no_scheme, "wants the dashboard's address; e.g. http://127.0.0.1:8265"),
            (lost, "the job's own copy of the folder, lost with it; --set storage.uri="),
            (strange, "which is what travels with the job"),
            (unknown, "no job is called 'nothing'"),
        ],
    }
    for code, answers in expected.items():
        for asked, line in answers:
            answer = asked.result()
            assert (answer.returncode, len(answer.stderr.splitlines())) == (code, 1), answer.stderr
            assert answer.stderr.startswith("tiger: ") and line in answer.stderr, answer.stderr
    for fine in (no_mode.result(), overridden.result()):
        assert fine.returncode == 0, fine.stderr
