"""Storage refuses, breaks off and fills up under a run: training never waits for it, and what arrives is whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from s3 import S3, s3_server

from tigerbot.storage import ManifestFile, Store, open_store
from tigerbot_jobs.train.checkpoint import HEADER, persist_file
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery import persist
from tigerbot_jobs.train.recovery.persist import Persister

HEADER_OF = {"world_size": 1, "zero_stage": 2, "spec_hash": "s", "tokenizer_hash": "t", "threads": 1}
IMAGE = bytes(range(256)) * 4096  # 1 MiB


class Kept:
    """A persister whose keeper is this process, and what it wrote into the ledger."""

    def __init__(self, uri: str) -> None:
        self.store: Store = open_store(uri)
        self.persister = Persister(self.store, "run/checkpoints", keep=3, every_s=None, cards=1)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.persister.persist_on, self.persister.log = self._put, self._log
        self.persister.ask_for_snapshot = lambda: None

    def save(self, step: int) -> None:
        """A rank says that its snapshot waits."""
        self.persister.saved("node", 0, say.Saved(1, step, "/x", HEADER_OF | {"step": step}))

    def steps(self) -> list[int]:
        """Checkpoints that a reader takes for whole, each of them checked."""
        found = []
        for key in self.store.committed("run/checkpoints"):
            for file in self.store.manifest(key).files:
                data = self.store.get_bytes(f"{key}/{file.path}")
                assert len(data) == file.size_bytes and hashlib.sha256(data).hexdigest() == file.sha256
            assert HEADER in {file.path for file in self.store.manifest(key).files}
            found.append(int(key.rsplit("-", 1)[1]))
        return sorted(found)

    def faults(self) -> list[str]:
        return [about["fault"] for kind, about in self.events if kind == "fault_seen"]

    def _log(self, kind: str, **about: Any) -> None:
        self.events.append((kind, about))

    async def _put(self, node: str, make: Callable[[int], say.Message], timeout_s: float) -> say.Put:
        order = make(1)
        assert isinstance(order, say.Persist)

        def put() -> list[ManifestFile]:
            return [persist_file(self.store, order.key, memoryview(IMAGE), "rank-00000.safetensors")]

        try:
            files = await asyncio.to_thread(put)
        except Exception as error:
            return say.Put(1, [], 0.0, str(error))
        return say.Put(1, [file.model_dump() for file in files], 0.0)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    with s3_server() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persist, "_RETRIES_S", (0.2,) * 60)


def test_a_bucket_that_refuses_for_a_while_is_a_fault_and_the_checkpoint_arrives_later(bucket: S3) -> None:
    async def story() -> Kept:
        kept = Kept(bucket.uri)
        kept.save(10)
        await kept.persister.settled(60)
        bucket.refuse(3600)
        kept.save(20)  # returns at once: the step goes on
        while not kept.faults():
            await asyncio.sleep(0.1)
        assert kept.persister.kept_step == 10
        await asyncio.to_thread(bucket.heal)
        assert not await kept.persister.settled(100)
        return kept

    kept = asyncio.run(story())

    assert kept.faults() == ["storage"] and kept.persister.kept_step == 20
    assert kept.steps() == [10, 20]


def test_an_upload_that_breaks_off_leaves_nothing_that_is_taken_for_a_checkpoint(bucket: S3) -> None:
    async def story() -> tuple[Kept, list[int]]:
        kept = Kept(bucket.uri)
        kept.save(10)
        await kept.persister.settled(60)
        bucket.cut_uploads(count=10**6, after_bytes=70_000)
        kept.save(20)
        await asyncio.sleep(2)
        bucket.heal()
        seen = kept.steps()
        assert not await kept.persister.settled(100)
        return kept, seen

    kept, seen = asyncio.run(story())

    assert seen in ([10], [10, 20]) and kept.steps() == [10, 20]


@pytest.mark.root
def test_a_full_disk_is_a_fault_until_there_is_room_and_says_so_at_the_end(tmp_path: Path) -> None:
    async def story(free: Callable[[], None]) -> tuple[Kept, str]:
        kept = Kept(str(tmp_path / "disk"))
        kept.save(20)
        problem = await kept.persister.settled(1.5)
        free()
        assert not await kept.persister.settled(30)
        return kept, problem

    with small_disk(tmp_path / "disk", size_mb=8) as disk:
        disk.fill(leave_bytes=200_000)
        kept, problem = asyncio.run(story(disk.free))
        steps = kept.steps()

    assert "No space left" in problem or "full" in problem
    assert set(kept.faults()) == {"storage"} and steps == [20]
