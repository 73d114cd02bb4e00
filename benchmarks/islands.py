"""Two islands beside plain ZeRO-2, in two network namespaces: tokens/s and bytes over a link of 50 Mbit/s each way, and
the loss at equal tokens, over a link without a limit: what is learned does not depend on the link, how long it takes does.

One rank in each namespace, one core each, same model, same seed, same number of tokens. Plain: both ranks are one
process group across the link. Islands: each is its own, and they meet every 20 steps at an outer server beside the
first, int8. Bytes are read from the interface's counters. Needs root; the namespaces are its own and always removed.
It is two CPU ranks on one machine: the link is slow as a link between sites is, the ranks are not fast as cards are.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row

RATE_MBIT, SEEDS, EVERY = 50, (1, 2, 3), 20
SLOW_STEPS, STEPS = 40, 600
LENGTH, ISLAND_BATCH, MICRO = 64, 16, 16
ADDRESSES = ("10.213.77.1", "10.213.77.2")
LIMIT_S = 400.0


@dataclass(frozen=True)
class Link:
    """Two joined namespaces; `devices[i]` is the end inside `names[i]`."""

    names: tuple[str, str]
    devices: tuple[str, str]

    def bytes(self) -> int:
        """Both directions, at the first end."""
        counters = [f"/sys/class/net/{self.devices[0]}/statistics/{way}_bytes" for way in ("rx", "tx")]
        said = subprocess.run(["ip", "netns", "exec", self.names[0], "cat", *counters], capture_output=True, check=True)
        return sum(map(int, said.stdout.split()))


@dataclass(frozen=True)
class Measured:
    tokens_per_second: float
    megabytes: float
    loss: float


def main() -> list[Row]:
    if os.geteuid() != 0:
        print("  islands: skipped: network namespaces need root")
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = _corpus(folder)
        with _link(RATE_MBIT) as link:
            rate = _link_rate(link)
            slow = _sides(folder / "slow", corpus, link, SLOW_STEPS, SEEDS[:1])
        with _link(None) as link:
            fast = _sides(folder / "fast", corpus, link, STEPS, SEEDS)
    what = f"2 CPU ranks, `tiny`, fp32 gradients, ZeRO-2, H = {EVERY}, int8"
    note = f"{what}, {SLOW_STEPS} steps, link of {rate:.1f} Mbit/s"
    long = f"{what}, {STEPS} steps, {STEPS // EVERY} outer rounds"
    faster = [a.tokens_per_second / b.tokens_per_second for a, b in zip(slow["islands"], slow["plain"], strict=True)]
    bytes_ratio = [a.megabytes / b.megabytes for a, b in zip(slow["islands"], slow["plain"], strict=True)]
    worse = [a.loss - b.loss for a, b in zip(fast["islands"], fast["plain"], strict=True)]
    return [
        _row("islands: tokens/s, ours / plain ZeRO-2", faster, "higher", "tokens_per_second", slow, note),
        _row("islands: bytes on the wire, ours / plain ZeRO-2", bytes_ratio, "lower", "megabytes", slow, note),
        _row("islands: held-out loss at equal tokens, ours - plain", worse, "lower", "loss", fast, long),
    ]


def _sides(folder: Path, corpus: Path, link: Link, steps: int, seeds: tuple[int, ...]) -> dict[str, list[Measured]]:
    sides: dict[str, list[Measured]] = {"islands": [], "plain": []}
    for index, seed in enumerate(seeds):
        for side in sorted(sides, reverse=bool(index % 2)):
            own = folder / f"{side}-{seed}"
            own.mkdir(parents=True)
            sides[side].append(_run(side, seed, steps, own, corpus, link))
            print(f"  seed {seed}, {steps} steps: {side}: {sides[side][-1]}", flush=True)
    return sides


def _row(measure: str, found: list[float], better: str, field: str, sides: dict[str, list[Measured]], note: str) -> Row:
    middle = {side: statistics.median(getattr(one, field) for one in runs) for side, runs in sides.items()}
    return Row(
        measure,
        statistics.median(found),
        min(found),
        max(found),
        better,
        "-",
        len(found),
        ours=f"{middle['islands']:.4g} {field}",
        stock=f"{middle['plain']:.4g} {field}",
        note=note,
    )


@contextmanager
def _link(rate_mbit: int | None) -> Iterator[Link]:
    own = os.getpid()
    link = Link((f"tiger-isl-{own}-a", f"tiger-isl-{own}-b"), (f"isl{own}a"[:15], f"isl{own}b"[:15]))
    try:
        for name in link.names:
            _do(f"ip netns add {name}")
        here, there = link.devices
        _do(f"ip link add {here} netns {link.names[0]} type veth peer name {there} netns {link.names[1]}")
        for name, device, address in zip(link.names, link.devices, ADDRESSES, strict=True):
            _do(f"ip -n {name} addr add {address}/24 dev {device}")
            _do(f"ip -n {name} link set lo up")
            _do(f"ip -n {name} link set {device} up")
            if rate_mbit is not None:  # tbf shapes what leaves a device: so on both ends
                _do(f"tc -n {name} qdisc add dev {device} root tbf rate {rate_mbit}mbit burst 64kb latency 400ms")
        yield link
    finally:
        for name in link.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _do(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def _link_rate(link: Link, megabytes: int = 12) -> float:
    """Mbit/s of one TCP stream."""
    take = f"import socket;s=socket.create_server(('{ADDRESSES[0]}',7401));print(1,flush=True);c=s.accept()[0]\nwhile c.recv(65536):pass"
    give = (
        f"import socket,time;c=socket.create_connection(('{ADDRESSES[0]}',7401));t=time.time();"
        f"c.sendall(bytes({megabytes}*10**6));c.shutdown(1);c.recv(1);print(time.time()-t)"
    )
    receiver = subprocess.Popen(_inside(link.names[0], "-c", take), stdout=subprocess.PIPE)
    try:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        said = subprocess.run(_inside(link.names[1], "-c", give), check=True, timeout=60, capture_output=True)
        return megabytes * 8 / float(said.stdout)
    finally:
        receiver.kill()
        receiver.wait()


def _inside(name: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", name, sys.executable, *words]


def _corpus(folder: Path) -> Path:
    """Generated stories, packed."""
    from tigerbot.runner import run_spec
    from tigerbot.spec import parse_spec
    from tigerbot_jobs.data import creative

    rng = random.Random(1)
    for name, count in (("train", 6000), ("held-out", 100)):
        texts = [creative.write("story", lang, rng) for _ in range(count) for lang in ("zh", "en")]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = [
        {"name": "train", "path": str(folder / "train.jsonl")},
        {"name": "held-out", "path": str(folder / "held-out.jsonl")},
    ]
    raw = {"kind": "corpus", "name": "corpus", "sources": sources, "tokenizer": {"vocab_size": 600}}
    run_spec(parse_spec(raw | {"sequence_length": LENGTH, "storage": {"uri": str(folder)}}))
    return folder / "corpus"


def _run(side: str, seed: int, steps: int, folder: Path, corpus: Path, link: Link) -> Measured:
    from tigerbot_jobs.train.islands.server import SECRET

    secret = {SECRET: "benchmark"}
    environment = os.environ | secret | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    started = []
    before = link.bytes()
    try:
        if side == "islands":
            words = ("-m", "tigerbot_jobs.train.islands.server", str(folder), f"{ADDRESSES[0]}:7400", '{"count": 2}')
            started.append(subprocess.Popen(_inside(link.names[0], *words), env=environment))
        ranks = []
        for rank in range(2):
            path = folder / f"rank-{rank}.json"
            path.write_text(json.dumps(_given(side, seed, rank, steps, folder, corpus)))
            environment["GLOO_SOCKET_IFNAME"] = link.devices[rank]
            ranks.append(
                subprocess.Popen(_inside(link.names[rank], "-m", "benchmarks.islands", str(path)), env=environment)
            )
        started += ranks
        statuses = [rank.wait(LIMIT_S) for rank in ranks]
        assert statuses == [0, 0], f"{side}: the ranks ended with {statuses}"
    finally:
        for process in started:
            process.kill()
            process.wait()
    rows = [json.loads((folder / f"rows-{rank}.json").read_text()) for rank in range(2 if side == "islands" else 1)]
    began, ended = max(one[0]["at"] for one in rows), max(one[-1]["at"] for one in rows)
    tokens = sum(one[-1]["tokens"] - one[0]["tokens"] for one in rows)
    loss = statistics.mean(one[-1]["validation_loss"] for one in rows)
    return Measured(tokens / (ended - began), (link.bytes() - before) / 1e6, loss)


def _given(side: str, seed: int, rank: int, steps: int, folder: Path, corpus: Path) -> dict[str, Any]:
    """What a rank is told: its spec and its process group."""
    batch = ISLAND_BATCH * (1 if side == "islands" else 2)
    spec: dict[str, Any] = {
        "kind": "train",
        "name": f"island-{rank}" if side == "islands" else "plain",
        "model": {"preset": "tiny", "tokenizer": str(corpus / "tokenizer")},
        "data": {"sequence_length": LENGTH, "train": [{"path": str(corpus / "tokens/train")}]},
        "train": {
            "tokens": steps * 2 * ISLAND_BATCH * LENGTH,
            "batch_tokens": batch * LENGTH,
            "micro_batch": MICRO,
            "lr": 2e-3,
            "seed": seed,
            "log_every": 2,
            "validate_every": steps,
        },
        "deepspeed": {"zero_stage": 2},
        "fault_tolerance": {"checkpoint_every_s": 1e6},
        "storage": {"uri": str(folder)},
    }
    if side == "plain":
        group = {"meeting": f"tcp://{ADDRESSES[0]}:7402", "rank": rank, "world_size": 2}
    else:
        spec["islands"] = {"count": 2, "every": EVERY, "member": rank, "server": f"{ADDRESSES[0]}:7400"}
        group = {"meeting": f"file://{folder}/meeting-{rank}", "rank": 0, "world_size": 1}
    held_out = str(corpus / "tokens/held-out")
    return group | {"spec": spec, "held_out": held_out, "core": rank, "rows": str(folder / f"rows-{rank}.json")}


def _rank(given: dict[str, Any]) -> None:
    """One rank, inside its namespace."""
    os.sched_setaffinity(0, {given["core"] % (os.cpu_count() or 1)})
    import torch
    import torch.distributed as dist

    from tigerbot.spec import TrainSpec, parse_spec, spec_hash
    from tigerbot_jobs.train.alone import train_rank
    from tigerbot_jobs.train.given import WorkerJob

    spec = parse_spec(given["spec"])
    assert isinstance(spec, TrainSpec)
    folder = Path(spec.storage.uri) / spec.name
    folder.mkdir(exist_ok=True)
    rank, world_size = given["rank"], given["world_size"]
    dist.init_process_group("gloo", init_method=given["meeting"], rank=rank, world_size=world_size)
    shards = [(Path(spec.data.train[0].path), 1.0)]
    job = WorkerJob(spec, spec_hash(spec), str(folder), shards, [Path(given["held_out"])], threads=1)
    rows: list[dict[str, float]] = []
    train_rank(
        job,
        rank,
        world_size,
        torch.device("cpu"),
        on_row=lambda row: rows.append(row | {"at": time.time()}),
        keep_model=False,
    )
    Path(given["rows"]).write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(json.loads(Path(sys.argv[1]).read_text()))
