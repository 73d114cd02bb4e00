"""Storage: what is committed is whole, whatever was cut, flipped, slow, full or killed in between.

Folders are real, the S3 service is moto's server in a process of its own, and the faults are real ones on the wire.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fault_proxy import Fault, FaultProxy

from tigerbot.errors import CorruptError, InputError, StorageError
from tigerbot.folders import FolderStore
from tigerbot.objects import ObjectOptions, ObjectStore
from tigerbot.storage import MANIFEST, Entry, MissingError, Store, open_store, sha256_file

MB = 1024 * 1024
QUICK = ObjectOptions(part_bytes=5 * MB, read_timeout_s=1.0, connect_timeout_s=1.0, sleep=lambda _: None)


@pytest.fixture(scope="session")
def proxy(moto_port: int) -> Iterator[FaultProxy]:
    between = FaultProxy(moto_port)
    yield between
    between.close()


@pytest.fixture
def wire(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy, healed, with an empty bucket behind it and credentials in the environment."""
    proxy.heal()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    httpx.post(f"{proxy.url}/moto-api/reset")
    httpx.put(f"{proxy.url}/bucket")
    proxy.heal()
    return proxy


@pytest.fixture
def bucket(wire: FaultProxy) -> ObjectStore:
    return ObjectStore("s3://bucket/team/a", QUICK)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket")


def checkpoint(folder: Path, seed: int = 0, sizes: tuple[int, ...] = (1000, 70_000)) -> Path:
    """A folder with random files, a Chinese name and a folder inside."""
    rng = random.Random(seed)
    (folder / "rank-0").mkdir(parents=True)
    for index, size in enumerate(sizes):
        (folder / f"rank-0/{index}.bin").write_bytes(rng.randbytes(size))
    (folder / "说明.txt").write_text(f"第 {seed} 步 step", encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_files_and_bytes_come_back_as_they_were_put(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))

    store.put_file(tmp_path / "a.bin", "数据/a.bin")
    store.put_bytes("数据/b", "你好 hello".encode())
    store.put_bytes("数据/empty", b"")
    store.put_bytes("数据2/c", b"c")
    store.get_file("数据/a.bin", tmp_path / "fetched/a.bin")

    assert (tmp_path / "fetched/a.bin").read_bytes() == bytes(range(256))
    assert store.get_bytes("数据/b").decode() == "你好 hello" and store.get_bytes("数据/empty") == b""
    assert store.list("数据") == [Entry("数据/a.bin", 256), Entry("数据/b", 12), Entry("数据/empty", 0)]
    assert len(store.list()) == 4 and store.list("nothing") == []
    assert store.exists("数据/b") and not store.exists("数据") and not store.exists("数据/z")


def test_deleting_a_prefix_leaves_its_longer_namesake(store: Store) -> None:
    store.put_bytes("run/step-1/a", b"1")
    store.put_bytes("run/step-10/a", b"10")

    store.delete("run/step-1")
    store.delete("run/step-1")

    assert [entry.key for entry in store.list()] == ["run/step-10/a"]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a//b", "a/../../b", ".staged-x"])
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str) -> None:
    with pytest.raises(InputError, match="wants a relative path"):
        store.put_bytes(key, b"x")


def test_what_is_missing_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no/such.*is not there"):
        store.get_bytes("no/such")
    with pytest.raises(MissingError, match=r"no/such.*is not there"):
        store.get_file("no/such", tmp_path / "x")
    with pytest.raises(MissingError, match="nothing whole was committed here"):
        store.fetch_folder("no/such", tmp_path / "y")
    with pytest.raises(InputError, match="is not a folder"):
        store.commit_folder(tmp_path / "z", "z")
    assert not list(tmp_path.glob("*[xyz]"))


def test_a_committed_folder_is_fetched_as_it_was(store: Store, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")

    manifest = store.commit_folder(source, "run/step-1")
    fetched = store.fetch_folder("run/step-1", tmp_path / "fetched")
    again = store.fetch_folder("run/step-1", tmp_path / "fetched")

    assert contents(tmp_path / "fetched") == contents(source)
    assert manifest == fetched == again and manifest.size_bytes == sum(map(len, contents(source).values()))
    assert {file.path: file.sha256 for file in manifest.files}["说明.txt"] == sha256_file(source / "说明.txt")
    assert store.committed() == store.committed("run") == store.committed("run/step-1") == ["run/step-1"]
    assert not list(tmp_path.rglob(".staged-*"))


def test_a_fetch_into_a_folder_with_other_files_leaves_them(store: Store, tmp_path: Path) -> None:
    store.commit_folder(checkpoint(tmp_path / "source"), "run/step-1")
    mine = checkpoint(tmp_path / "mine", seed=7)

    with pytest.raises(StorageError, match="holds other files"):
        store.fetch_folder("run/step-1", mine)

    assert "第 7 步" in (mine / "说明.txt").read_text()


@pytest.mark.parametrize("damage", ["flipped", "shortened", "removed"])
def test_a_damaged_file_is_named_and_nothing_is_fetched(store: Store, tmp_path: Path, damage: str) -> None:
    store.commit_folder(checkpoint(tmp_path / "source"), "run/step-1")
    data = bytearray(store.get_bytes("run/step-1/rank-0/1.bin"))
    data[40_000] ^= 1
    if damage == "removed":
        store.delete("run/step-1/rank-0/1.bin")
    else:
        store.put_bytes("run/step-1/rank-0/1.bin", bytes(data if damage == "flipped" else data[:-1]))

    with pytest.raises(CorruptError, match=r"rank-0/1\.bin.*(differs|missing)"):
        store.fetch_folder("run/step-1", tmp_path / "fetched")

    assert not list(tmp_path.glob("*fetched*"))
    assert store.committed() == (["run/step-1"] if damage == "flipped" else [])


def test_a_manifest_of_a_newer_version_is_refused_and_never_taken_for_rubbish(store: Store, tmp_path: Path) -> None:
    store.commit_folder(checkpoint(tmp_path / "source"), "run/step-1")
    text = store.get_bytes(f"run/step-1/{MANIFEST}").decode()
    store.put_bytes(f"run/step-1/{MANIFEST}", text.replace('"format_version": 1', '"format_version": 2').encode())

    for read in (lambda: store.fetch_folder("run/step-1", tmp_path / "x"), lambda: store.retain("run", 1)):
        with pytest.raises(StorageError, match="has format version 2; this version reads up to 1; upgrade tigerbot"):
            read()

    assert store.exists("run/step-1/说明.txt")


def test_a_manifest_cannot_name_files_outside(store: Store, tmp_path: Path) -> None:
    entry = f'{{"path": "../../evil", "size_bytes": 1, "sha256": "{"0" * 64}"}}'
    store.put_bytes(f"run/step-1/{MANIFEST}", f'{{"format_version": 1, "files": [{entry}]}}'.encode())

    with pytest.raises(InputError, match="wants a relative path"):
        store.fetch_folder("run/step-1", tmp_path / "x")


def test_a_key_is_committed_over_an_incomplete_or_an_earlier_one(store: Store, tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "1", seed=1), checkpoint(tmp_path / "2", seed=2, sizes=(500,))
    store.put_bytes("run/step-1/rank-0/0.bin", b"half")
    store.put_bytes("run/step-1/stray", b"stray")

    assert store.committed() == []
    store.commit_folder(first, "run/step-1")
    store.fetch_folder("run/step-1", tmp_path / "fetched-1")
    store.commit_folder(second, "run/step-1")
    store.commit_folder(second, "run/step-1")
    store.fetch_folder("run/step-1", tmp_path / "fetched-2")

    assert contents(tmp_path / "fetched-1") == contents(first) and contents(tmp_path / "fetched-2") == contents(second)
    assert len(store.list("run/step-1")) == len(contents(second)) + 1


@pytest.mark.parametrize("rubbish", [b"", b"{", b'{"format_version": "x"}'])
def test_a_key_with_a_damaged_manifest_is_not_whole_and_can_be_committed_again(
    store: Store, tmp_path: Path, rubbish: bytes
) -> None:
    source = checkpoint(tmp_path / "source")
    store.commit_folder(source, "run/step-1")
    store.put_bytes(f"run/step-1/{MANIFEST}", rubbish)

    with pytest.raises(CorruptError, match=r"run/step-1: MANIFEST.json is not a manifest"):
        store.fetch_folder("run/step-1", tmp_path / "x")
    assert store.committed() == []

    store.commit_folder(source, "run/step-1")
    assert store.committed() == ["run/step-1"]


def test_a_stored_object_that_differs_from_its_checksum_is_not_whole_and_can_be_committed_again(
    bucket: ObjectStore, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source")
    bucket.commit_folder(source, "run/step-1")
    bucket._client.put_object(
        Bucket="bucket", Key=f"team/a/run/step-1/{MANIFEST}", Body=b"half", Metadata={"sha256": "0" * 64}
    )

    assert bucket.committed() == []
    bucket.commit_folder(source, "run/step-1")

    assert bucket.committed() == ["run/step-1"]


def test_retention_keeps_the_last_and_removes_what_older_commits_left(store: Store, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    for step in (1, 3, 4, 5):
        store.commit_folder(source, f"run/step-{step}")
    store.put_bytes("run/step-2/rank-0/0.bin", b"half of an older one")
    store.put_bytes("run/step-6/rank-0/0.bin", b"half of one being written")
    store.put_bytes("run/notes.txt", b"not a checkpoint")
    store.commit_folder(source, "run2/step-1")

    removed = store.retain("run", keep=2)

    assert removed == ["run/step-1", "run/step-2", "run/step-3"]
    assert store.committed() == ["run/step-4", "run/step-5", "run2/step-1"]
    assert store.exists("run/step-6/rank-0/0.bin") and store.exists("run/notes.txt")
    assert store.retain("run", keep=2) == [] == store.retain("empty", keep=1)
    with pytest.raises(InputError, match="wants at least 1"):
        store.retain("run", keep=0)


def test_deletion_cut_short_leaves_nothing_that_looks_whole(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path
) -> None:
    bucket.commit_folder(checkpoint(tmp_path / "source"), "run/step-1")
    wire.hurt(Fault("delay", "POST", seconds=0))  # the request that removes the manifest passes
    wire.hurt(Fault("status_500", "POST", times=QUICK.attempts))

    with pytest.raises(StorageError, match="failed 6 times"):
        bucket.delete("run/step-1")

    assert bucket.committed() == [] and bucket.exists("run/step-1/说明.txt")


def test_every_address_opens_its_store(wire: FaultProxy, tmp_path: Path) -> None:
    for uri in (str(tmp_path / "f"), f"file://{tmp_path}/f", "s3://bucket", "s3://bucket/p/"):
        open_store(uri).put_bytes("a", b"1")

    assert (tmp_path / "f/a").read_bytes() == b"1"
    assert open_store("s3://bucket").list() == [Entry("a", 1), Entry("p/a", 1)]
    with pytest.raises(InputError, match="wants a folder, file:// or s3://"):
        open_store("gs://bucket/x")
    with pytest.raises(InputError, match="names no bucket"):
        open_store("s3:///x")


UPLOAD_FAULTS = [
    Fault("kill_upload", "PUT", after_bytes=20_000),
    Fault("truncate_upload", "PUT", after_bytes=50_000),
    Fault("flip_upload", "PUT", after_bytes=100),
    Fault("status_500", "PUT", times=3),
    Fault("kill_answer", "PUT", after_bytes=0),
    Fault("delay", "PUT", seconds=1.5),
]


@pytest.mark.parametrize("fault", UPLOAD_FAULTS, ids=lambda fault: fault.damage)
@pytest.mark.parametrize("size", [70_000, 11 * MB], ids=["one piece", "parts"])
def test_an_upload_that_is_hurt_arrives_whole(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path, fault: Fault, size: int
) -> None:
    (tmp_path / "a").write_bytes(random.Random(size).randbytes(size))
    wire.hurt(Fault(**vars(fault)))

    bucket.put_file(tmp_path / "a", "a")

    wire.heal()
    bucket.get_file("a", tmp_path / "b")
    assert sha256_file(tmp_path / "b") == sha256_file(tmp_path / "a")


DOWNLOAD_FAULTS = [
    Fault("kill_answer", "GET", after_bytes=2 * MB),
    Fault("flip_answer", "GET", after_bytes=2 * MB),
    Fault("status_500", "GET", times=3),
    Fault("delay", "GET", seconds=1.5),
]


@pytest.mark.parametrize("fault", DOWNLOAD_FAULTS, ids=lambda fault: fault.damage)
def test_a_download_that_is_hurt_arrives_whole(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    (tmp_path / "a").write_bytes(random.Random(1).randbytes(3 * MB))
    bucket.put_file(tmp_path / "a", "a")
    wire.hurt(Fault(**vars(fault)))

    bucket.get_file("a", tmp_path / "b")

    assert sha256_file(tmp_path / "b") == sha256_file(tmp_path / "a")


def test_an_upload_whose_last_answer_was_lost_is_known_to_stand(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(random.Random(1).randbytes(11 * MB))
    wire.hurt(Fault("delay", "POST", seconds=0))  # the beginning of the upload passes, its completion's answer is cut
    wire.hurt(Fault("kill_answer", "POST", after_bytes=0))

    bucket.put_file(tmp_path / "a", "a")

    assert len([path for method, path in wire.requests if method == "PUT"]) == 3
    bucket.get_file("a", tmp_path / "b")
    assert sha256_file(tmp_path / "b") == sha256_file(tmp_path / "a")


@pytest.mark.parametrize("after_bytes", [0, 30, 200])
def test_a_listing_that_is_cut_is_asked_for_again(bucket: ObjectStore, wire: FaultProxy, after_bytes: int) -> None:
    bucket.put_bytes("a", b"1")
    wire.hurt(Fault("kill_answer", "GET", after_bytes=after_bytes))

    assert bucket.list() == [Entry("a", 1)]


def test_an_answer_that_is_cut_is_not_taken_for_an_empty_one(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(random.Random(1).randbytes(6 * MB))
    for method in ("GET", "POST", "HEAD"):
        wire.hurt(Fault("kill_answer", method))
    bucket.put_file(tmp_path / "a", "a")
    wire.hurt(Fault("kill_answer", "GET"))
    assert bucket.get_bytes("a") == (tmp_path / "a").read_bytes()

    wire.hurt(Fault("kill_answer", "POST"))
    bucket.delete("a")

    assert bucket.list() == [] and bucket._uploads("") == []


def test_a_service_that_stays_broken_is_one_clear_line_after_bounded_attempts(wire: FaultProxy) -> None:
    waits: list[float] = []
    store = ObjectStore("s3://bucket/a", ObjectOptions(sleep=waits.append))
    wire.hurt(Fault("status_500", times=100))

    with pytest.raises(
        StorageError,
        match=r"s3://bucket/a/b: failed 6 times, last: PutObject answered InternalError.*check AWS_ENDPOINT_URL",
    ):
        store.put_bytes("b", b"x")

    assert len(waits) == 5 and len(wire.requests) == 6 and all(0 <= wait <= 20 for wait in waits)
    assert len(set(waits)) == 5


def test_a_wrong_checksum_is_never_taken(bucket: ObjectStore, wire: FaultProxy) -> None:
    wire.hurt(Fault("flip_upload", "PUT", times=100))

    with pytest.raises(CorruptError, match="what arrived differs from what was sent"):
        bucket.put_bytes("a", b"some bytes")


def test_nobody_listening_is_one_clear_line(wire: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(StorageError, match="failed 6 times, last: Could not connect"):
        ObjectStore("s3://bucket/a", QUICK).list()


def test_refusals_are_said_at_once_with_their_fix(
    wire: FaultProxy, moto_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "source")
    missing = ObjectStore("s3://no-such-bucket/a", QUICK)
    for use in (
        lambda: missing.put_bytes("b", b"x"),
        missing.list,
        lambda: missing.commit_folder(tmp_path / "source", "c"),
    ):
        wire.heal()
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/a.*the bucket does not exist; make it"):
            use()
        assert len(wire.requests) == 1

    reset_auth = f"http://127.0.0.1:{moto_port}/moto-api/reset-auth"
    httpx.post(reset_auth, content=b"0")
    try:
        wire.heal()
        with pytest.raises(StorageError, match="does not know this access key; correct AWS_ACCESS_KEY_ID"):
            ObjectStore("s3://bucket/a", QUICK).list()
        assert len(wire.requests) == 1
    finally:
        httpx.post(reset_auth, content=b"inf")

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="there are no S3 credentials; set AWS_ACCESS_KEY_ID"):
        ObjectStore("s3://bucket/a", QUICK).list()


def test_an_upload_goes_on_where_another_process_was_cut_off(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(random.Random(3).randbytes(23 * MB))
    one_by_one = ObjectStore(bucket.uri, ObjectOptions(part_bytes=5 * MB, workers=1, attempts=1))
    for _ in range(3):
        wire.hurt(Fault("delay", "PUT", seconds=0))
    wire.hurt(Fault("kill_upload", "PUT", times=10, after_bytes=1000))

    with pytest.raises(StorageError, match="failed 1 times"):
        one_by_one.put_file(tmp_path / "a", "a")
    wire.heal()
    bucket.put_file(tmp_path / "a", "a")

    assert len([path for method, path in wire.requests if method == "PUT"]) == 2 and wire.bytes_up < 10 * MB
    bucket.get_file("a", tmp_path / "b")
    assert sha256_file(tmp_path / "b") == sha256_file(tmp_path / "a")


@pytest.mark.parametrize("changed_at", [0, 22 * MB], ids=["in a part that arrived", "in a part that did not"])
def test_an_unfinished_upload_of_other_bytes_does_not_leak_into_the_object(
    bucket: ObjectStore, wire: FaultProxy, tmp_path: Path, changed_at: int
) -> None:
    data = bytearray(random.Random(3).randbytes(23 * MB))
    (tmp_path / "a").write_bytes(data)
    wire.hurt(Fault("delay", "PUT", times=2, seconds=0))
    wire.hurt(Fault("kill_upload", "PUT", times=10, after_bytes=1000))
    with pytest.raises(StorageError):
        ObjectStore(bucket.uri, ObjectOptions(part_bytes=5 * MB, workers=1, attempts=1)).put_file(tmp_path / "a", "a")
    wire.heal()
    data[changed_at] ^= 1
    (tmp_path / "a").write_bytes(data)

    bucket.put_file(tmp_path / "a", "a")

    bucket.get_file("a", tmp_path / "b")
    assert sha256_file(tmp_path / "b") == sha256_file(tmp_path / "a")
    assert bucket._uploads("a") == []


def test_retention_sweeps_what_dead_writers_staged_and_nothing_in_use(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for step in (2, 3):
        store.commit_folder(checkpoint(tmp_path / f"source-{step}"), f"run/step-{step}")
    host, dead = socket.gethostname(), 2**22 + 1  # beyond the largest pid there can be
    swept = (f".staged-step-1@{host}@{dead}@a", ".staged-step-1@other@1@b")
    kept = (f".staged-step-1@{host}@{os.getpid()}@c", f".staged-step-4@{host}@{dead}@d", ".staged-notes@other@1@e")
    for name in (*swept, *kept):
        folder = tmp_path / "store/run" / name
        folder.touch() if "notes" in name else folder.mkdir()

    removed = store.retain("run", keep=2)

    assert removed == ["run/step-1"] and store.committed() == ["run/step-2", "run/step-3"]
    assert sorted(path.name for path in (tmp_path / "store/run").glob(".staged-*")) == sorted(kept)


def test_retention_ends_uploads_that_older_commits_left(bucket: ObjectStore, wire: FaultProxy, tmp_path: Path) -> None:
    checkpoint(tmp_path / "big", sizes=(11 * MB,))
    wire.hurt(Fault("kill_upload", "PUT", times=100, after_bytes=1000))
    with pytest.raises(StorageError):
        bucket.commit_folder(tmp_path / "big", "run/step-1")
    wire.heal()
    assert len(bucket._uploads("run")) == 1

    bucket.commit_folder(checkpoint(tmp_path / "small"), "run/step-2")
    bucket.retain("run", keep=1)

    assert bucket._uploads("run") == [] and bucket.committed() == ["run/step-2"]


COMMIT_FOR_EVER = """
import sys
from pathlib import Path
from tigerbot.storage import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
step = int(sys.argv[3])
while True:
    store.commit_folder(Path(sys.argv[2]), f"run/step-{step:04d}")
    step += 1
"""


@pytest.mark.parametrize(("kind", "kills"), [("folder", 20), ("s3", 5)])
def test_a_killed_commit_is_never_seen_half(
    kind: str, kills: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """kill -9 at random moments; after each, everything a reader can see is whole."""
    store = FolderStore(tmp_path / "store") if kind == "folder" else request.getfixturevalue("bucket")
    source = checkpoint(tmp_path / "source", sizes=(MB, 2 * MB, 300_000))
    rng, step, seen = random.Random(kills), 0, 0

    for kill in range(kills):
        command = [sys.executable, "-c", COMMIT_FOR_EVER, store.uri, str(source), str(step)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert writer.stdout and writer.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.15 if kind == "folder" else 0.8))
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(10)

        keys = store.committed("run")
        for key in keys[-3:]:
            store.fetch_folder(key, tmp_path / f"fetched-{kill}-{key.rpartition('/')[2]}")
        seen += len(keys)
        store.retain("run", keep=2)
        step = int(keys[-1].rpartition("-")[2]) + 1 if keys else step

    store.commit_folder(source, f"run/step-{step:04d}")
    store.retain("run", keep=1)
    fetched = list(tmp_path.glob("fetched-*"))
    assert seen > 0 and fetched and all(contents(folder) == contents(source) for folder in fetched)
    assert store.committed() == [f"run/step-{step:04d}"] and len(store.list()) == len(contents(source)) + 1
    assert not list((tmp_path / "store").rglob(".staged-*"))


COMMIT_OVER = """
import sys
from pathlib import Path
from tigerbot.storage import open_store
store, source = open_store(sys.argv[1]), Path(sys.argv[2])
source.mkdir()
for turn in range(100_000):
    for name in ("a", "b", "说明"):
        (source / name).write_text(str(turn) * 5000)
    store.commit_folder(source, "run/step-1")
"""


def test_a_reader_beside_a_writer_sees_one_commit_whole(store: Store, tmp_path: Path) -> None:
    """A key that is committed over and over, with other bytes each time, while it is read."""
    writer = subprocess.Popen([sys.executable, "-c", COMMIT_OVER, store.uri, str(tmp_path / "source")])
    fetched: list[dict[str, bytes]] = []
    deadline = time.monotonic() + 60
    try:
        while len(fetched) < 10 and time.monotonic() < deadline:
            target = tmp_path / f"fetched-{len(fetched)}"
            try:
                store.fetch_folder("run/step-1", target)
                fetched.append(contents(target))
            except StorageError as error:
                # Between two commits nothing may be there; a damaged one may never be.
                assert "nothing whole" in str(error) or "changes faster" in str(error), str(error)
    finally:
        writer.kill()
        writer.wait(10)

    assert len(fetched) == 10
    assert all(len(files) == 3 and len(set(files.values())) == 1 for files in fetched)


@pytest.mark.root
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(
    small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = small_disk("3m")
    store = FolderStore(disk)
    small = checkpoint(tmp_path / "small", sizes=(MB,))
    big = checkpoint(tmp_path / "big", sizes=(MB, 3 * MB))
    store.commit_folder(small, "run/step-1")

    uses = (
        lambda: store.commit_folder(big, "run/step-2"),
        lambda: store.put_file(big / "rank-0/1.bin", "file"),
        lambda: store.put_bytes("bytes", bytes(4 * MB)),
        lambda: FolderStore(tmp_path / "roomy").fetch_folder("run/big", disk / "fetched"),
    )
    FolderStore(tmp_path / "roomy").commit_folder(big, "run/big")
    for use in uses:
        with pytest.raises(StorageError, match=rf"{disk}.*the disk is full; free space"):
            use()

    assert store.committed() == ["run/step-1"] and len(store.list()) == 3
    assert not list(disk.rglob("*.staged-*")) and not list(disk.rglob(".staged-*"))
    store.commit_folder(small, "run/step-2")
