"""Snapshots in shared memory: a writer may die at any moment, and a reader finds a whole one."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from tigerbot.errors import CorruptError, StorageError
from tigerbot_jobs.train.memory import SnapshotBuffer, interval, read_snapshots
from tigerbot_jobs.train.shard import Shard, ShardMeta, Slice, encode_header, write_shard

META = ShardMeta(0, 1, 2, 2, 0, (Slice("w", (500, 2), 0, 1000, 0, 0), Slice("norm", (7,), 0, 7, 1, 0)))


def state(step: int, numel: int = 1000) -> dict[str, Tensor]:
    return {
        "0.master": torch.full((numel,), float(step)),
        "0.exp_avg": torch.arange(numel) + float(step),
        "1.master": torch.full((7,), -float(step)),
        "1.step": torch.tensor([float(step)]),
    }


@pytest.fixture
def shm() -> Iterator[Path]:
    folder = Path(f"/dev/shm/tiger-test-{os.getpid()}")
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# The image.


def test_an_image_is_a_safetensors_file_and_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "rank-00001.safetensors"

    write_shard(path, META, state(3))

    shard = Shard.open(path)
    assert same(load(path.read_bytes()), state(3))
    assert shard.meta == META and shard.size_bytes == path.stat().st_size
    assert torch.equal(shard.tensor("0.exp_avg", 10, 20), torch.arange(10, 20) + 3.0)
    ranges = Shard(lambda begin, end: path.read_bytes()[begin:end], "far")
    assert ranges.meta == META and torch.equal(ranges.tensor("1.master"), torch.full((7,), -3.0))


def test_a_newer_image_or_a_broken_one_is_one_line(tmp_path: Path) -> None:
    header = encode_header(META, {"0.master": 4})

    with pytest.raises(StorageError, match="x: has format version 3, this program reads up to 2"):
        Shard.over(header.replace(b'format_version\\":2', b'format_version\\":3'), "x")
    for broken in (b"", header[:100], b"\xff" * 200, header.replace(b"slices", b"sluces"), header[:8] + b"{}"):
        with pytest.raises(CorruptError, match="x: is not a whole shard"):
            Shard.over(broken, "x")
    with pytest.raises(CorruptError, match="x: is not a whole shard"):
        Shard.over(header + b"1234", "x").array("0.master")


# The buffer.


def test_the_newest_snapshot_comes_first_and_the_one_before_it_second(shm: Path) -> None:
    buffer = SnapshotBuffer.create(shm / "rank-1", META, state(0))
    assert read_snapshots(shm / "rank-1") == []

    for step in range(1, 6):
        buffer.write(state(step), step=step, generation=2, extra={"skip": [step]})
        found = read_snapshots(shm / "rank-1")

        assert [snapshot.step for snapshot in found] == [step, step - 1][: len(found)]
        assert same(load(bytes(found[0].view)), state(step))
        assert found[0].shard().meta.extra == {"skip": [step]} and found[0].generation == 2
    assert len(found) == 2 and found[0].shard().meta.slices == META.slices


def test_a_reader_knows_when_a_slot_was_written_under_its_hands(shm: Path) -> None:
    buffer = SnapshotBuffer.create(shm / "rank-1", META, state(0))
    buffer.write(state(1), step=1, generation=0, extra={})
    first = read_snapshots(shm / "rank-1")[0]

    buffer.write(state(2), step=2, generation=0, extra={})
    assert first.unchanged()
    buffer.begin(state(3), step=3, generation=0, extra={})

    assert not first.unchanged()
    assert [snapshot.step for snapshot in read_snapshots(shm / "rank-1")] == [2]
    buffer.finish()
    assert [snapshot.step for snapshot in read_snapshots(shm / "rank-1")] == [3, 2]


def _kill_writers(path: Path, rounds: int, numel: int) -> None:
    """In a process of its own, with one thread, so that it can be forked."""
    torch.set_num_threads(1)
    rng, began, torn = random.Random(1), mmap.mmap(-1, 8), 0

    def write() -> None:
        buffer = SnapshotBuffer.create(path, META, state(0, numel))
        for step in range(1, 100_000):
            made = state(step, numel)
            struct.pack_into("<q", began, 0, step)
            buffer.write(made, step=step, generation=0, extra={"step": step})

    for _ in range(rounds):
        struct.pack_into("<q", began, 0, 0)
        child = os.fork()
        if child == 0:
            write()
        while struct.unpack_from("<q", began)[0] < 2:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

        step = struct.unpack_from("<q", began)[0]
        found = read_snapshots(path)
        assert found[0].step in (step, step - 1)
        torn += len(found) == 1
        for snapshot in found:
            assert snapshot.shard().meta.extra == {"step": snapshot.step}
            assert same(load(bytes(snapshot.view)), state(snapshot.step, numel))
    assert torn  # some were killed in the middle of a snapshot


def test_a_writer_that_is_killed_at_any_moment_leaves_its_last_or_last_but_one_step(shm: Path) -> None:
    killer = mp.get_context("spawn").Process(target=_kill_writers, args=(shm / "killed", 25, 400_000))

    killer.start()
    killer.join()

    assert killer.exitcode == 0


def test_a_reader_needs_no_torch(shm: Path) -> None:
    SnapshotBuffer.create(shm / "rank-1", META, state(0)).write(state(4), step=4, generation=0, extra={})
    program = (
        "import sys; from pathlib import Path; from tigerbot_jobs.train.memory import read_snapshots\n"
        f"found = read_snapshots(Path({str(shm / 'rank-1')!r}))[0]\n"
        "print(found.step, found.shard().array('0.master').mean(), 'torch' in sys.modules)"
    )

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert said.split() == ["4", "4.0", "False"]


def test_no_room_and_foreign_files_are_one_line(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = os.statvfs_result((4096, 4096, 100, 50, 50, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: small)
    with pytest.raises(StorageError, match=r"take 16 MB, 0 MB are free of 0 MB; mount a larger /dev/shm"):
        SnapshotBuffer.create(shm / "rank-1", META, state(0, 1_000_000))
    assert not list(shm.iterdir())

    (shm / "other").write_bytes(b"x" * 5000)
    with pytest.raises(CorruptError, match="is not a snapshot file"):
        read_snapshots(shm / "other")
    with pytest.raises(StorageError, match="is not there"):
        read_snapshots(shm / "none")


@given(st.floats(0, 100), st.floats(1e-3, 100), st.integers(1, 1000))
def test_snapshots_are_as_often_as_their_cost_allows(copy_s: float, step_s: float, before: int) -> None:
    best = interval(copy_s, step_s)

    assert copy_s <= 0.0201 * best * step_s + 1e-9
    assert best == 1 or copy_s > 0.0199 * (best - 1) * step_s
    assert before / 2 <= interval(copy_s, step_s, before=before) <= 2 * before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_copy_off_the_gpu_overlaps_work_and_is_whole_when_waited_for(shm: Path) -> None:
    numel = 50_000_000
    held = {name: tensor.cuda() for name, tensor in state(5, numel).items()}
    buffer = SnapshotBuffer.create(shm / "gpu", META, held)

    began = time.perf_counter()
    buffer.begin(held, step=5, generation=0, extra={})
    blocked = time.perf_counter() - began
    buffer.finish()

    assert blocked < time.perf_counter() - began
    held["0.master"].fill_(0)
    assert same(load(bytes(read_snapshots(shm / "gpu")[0].view)), state(5, numel))
