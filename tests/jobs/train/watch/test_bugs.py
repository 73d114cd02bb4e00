"""What a failure was: told from its exception and from the failures before it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from gloo_peers import what_the_survivor_hears

from tigerbot.errors import StorageError
from tigerbot_jobs.train.watch.bugs import BugKey, BugMemory, describe, is_communication_error
from tigerbot_jobs.train.watch.skips import SkipList

HERE = BugKey("KeyError", "tigerbot_jobs/train/data.py:micro_batches", 10)


def test_the_same_failure_with_nothing_done_in_between_stops_at_the_second_time() -> None:
    memory = BugMemory()

    first = memory.failed(HERE, batch=10, steps_since=10, furthest=10)
    second = memory.failed(HERE, batch=10, steps_since=0, furthest=10, line="KeyError: 'x'")

    assert (first.action, second.action) == ("restart", "stop")
    assert second.evidence == "twice at step 10 with nothing done in between, so it is a bug: KeyError: 'x'"


def test_the_same_batch_with_other_steps_between_is_quarantined_once_and_then_it_is_a_bug() -> None:
    memory = BugMemory()

    actions = [
        memory.failed(HERE, batch=10, steps_since=10, furthest=10),
        memory.failed(HERE, batch=10, steps_since=5, furthest=10),
        memory.failed(HERE, batch=11, steps_since=5, furthest=10),
    ]

    assert [one.action for one in actions] == ["restart", "quarantine", "stop"]
    assert "global batch 10 failed twice" in actions[1].evidence and "another batch too" in actions[2].evidence


def test_another_failure_further_on_is_only_a_restart() -> None:
    memory = BugMemory()

    judged = [
        memory.failed(BugKey("OSError", "a:b", step), batch=step, steps_since=7, furthest=step)
        for step in range(7, 700, 7)
    ]

    assert {one.action for one in judged} == {"restart"}


def test_restarts_without_progress_end_whatever_they_were_for() -> None:
    memory = BugMemory(max_restarts=5)

    judged = [memory.failed(None, batch=None, steps_since=3, furthest=40).action for _ in range(6)]

    assert judged == ["restart"] * 5 + ["stop"]


def test_memory_outlives_the_driver() -> None:
    before, after = BugMemory(), BugMemory()
    before.failed(HERE, batch=10, steps_since=10, furthest=10)

    after.restore(json.loads(json.dumps(before.state())))

    assert after.failed(HERE, batch=10, steps_since=0, furthest=10).action == "stop"


def test_an_exception_is_described_by_its_cause_and_our_innermost_frame() -> None:
    def fail() -> None:
        try:
            SkipList.from_json([(3, 1)])
        except ValueError as error:
            raise RuntimeError("the worker failed") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    key, line = describe(caught.value, step=4)

    assert key == BugKey("ValueError", "tigerbot_jobs/train/watch/skips.py:add", 4)
    assert line == "ValueError: batches 3 to 1 are no interval (tigerbot_jobs/train/watch/skips.py:add, step 4)"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_killed_or_frozen_is_communication_and_no_bug(sign: signal.Signals, tmp_path: Path) -> None:
    taken, kind, line = what_the_survivor_hears(tmp_path, sign)

    assert taken, line
    assert kind == "RuntimeError" and (
        "reset" in line or "closed" in line if sign == signal.SIGKILL else "Timed out" in line
    )


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled system error",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE) ran for 600031 ms",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:47203",
        "[Rank 0]: Ranks 2 failed to pass monitoredBarrier in 3000 ms",
    ],
)
def test_what_nccl_and_gloo_say_is_communication(text: str) -> None:
    error = RuntimeError("in backward")
    error.__cause__ = RuntimeError(text)

    assert is_communication_error(error) and is_communication_error(dist.DistBackendError("anything"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x2)"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        StorageError("Connection reset by peer", where="s3://bucket"),
        ConnectionRefusedError("[Errno 111] Connection refused"),
        KeyError("gloo"),
    ],
)
def test_bugs_storage_and_http_are_not(error: Exception) -> None:
    assert not is_communication_error(error)
