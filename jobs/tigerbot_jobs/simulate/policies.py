"""Policies: what a job does about a failure, and how long each part of that takes. Times in seconds.

Where two policies do the same thing they take the same time: a process start, a cold node, a write to storage and a
read from it are the site's. They differ in what they do. Every number is an input under its own name; the comment says
where it comes from. They were written down before the first comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tigerbot.spec import FaultKind

# The site's times, equal for all.
PROCESS_START_S = 60.0  # imports, CUDA context, NCCL, engine: "tens of seconds" (research/training.md, section 3)
NODE_START_S = 120.0  # assumed: placing a container on an idle node, then a process start
STORAGE_WRITE_S = 120.0  # GLM-65B on 1,536 H800: saving took 2 minutes (DLRover's blog)
STORAGE_RESTORE_S = 60.0  # assumed: reading runs at twice the speed of writing
LOCAL_SAVE_S = 10.0  # assumed: torch.save of a shard to the local disk, uploaded in the background
NOTICED_CORRUPTION_S = 60.0  # assumed: published counts hold only what somebody noticed
NCCL_TIMEOUT_S = 600.0  # PyTorch's default for a collective over NCCL


@dataclass(frozen=True)
class Policy:
    """A policy. `auto` intervals are Young's, from the block and the mean time between failures.

    Attributes:
        standbys: nodes kept warm (processes up, imports done), taken out of the spares.
        elastic: goes on with fewer nodes while none is there to take a lost one's place.
        memory_survives: kinds of faults after which the memory tier still holds the whole state.
        detect_*_s: from the last work done to the decision to recover.
        takeover_s: a warm standby takes the rank of a dead process, the rest re-forms.
        restart_s: processes are started again on the same nodes.
        swap_warm_s, swap_cold_s: a standby, or an idle node with nothing running, takes a lost node's ranks.
        shrink_s, grow_s: the world is re-formed with fewer, or more.
        straggler_notice_s: until a slow node is known and swapped.
    """

    name: str
    standbys: int
    elastic: bool
    memory: bool
    memory_every_s: float | Literal["auto"]
    memory_block_s: float
    memory_restore_s: float
    memory_survives: tuple[FaultKind, ...]
    storage_every_s: float | Literal["auto"]
    storage_block_s: float
    storage_write_s: float
    storage_restore_s: float
    detect_process_s: float
    detect_hang_s: float
    detect_node_s: float
    detect_island_s: float
    detect_corruption_s: float
    takeover_s: float
    restart_s: float
    swap_warm_s: float
    swap_cold_s: float
    shrink_s: float
    grow_s: float
    straggler_notice_s: float


OURS = Policy(
    name="ours",
    standbys=2,
    elastic=True,
    memory=True,
    memory_every_s=10.0,  # every step of the default step time
    memory_block_s=0.05,  # 0.82 GB a card through pinned memory: 30-50 ms (research/training.md, section 2a)
    memory_restore_s=2.0,  # measured 0.46 s for 250 MB from a peer, re-forming included; 0.82 GB here
    memory_survives=("process", "hang", "node"),  # a copy on another node; not against a whole island
    storage_every_s="auto",
    storage_block_s=0.0,  # written from the memory tier by the keeper
    storage_write_s=STORAGE_WRITE_S,
    storage_restore_s=STORAGE_RESTORE_S,
    detect_process_s=3.0,  # with takeover and restore: 15 s. Two CPU workers measured under 1 s in all
    detect_hang_s=55.0,  # 5 x p99 of a 10 s step + 5 s: the hang deadline's rule
    detect_node_s=10.0,  # with swap and restore: 60 s
    detect_island_s=10.0,
    detect_corruption_s=NOTICED_CORRUPTION_S,
    takeover_s=10.0,
    restart_s=PROCESS_START_S,
    swap_warm_s=48.0,
    swap_cold_s=NODE_START_S,
    shrink_s=10.0,  # measured: as long as a takeover
    grow_s=10.0,
    straggler_notice_s=300.0,  # three windows of 100 s
)

RAY_TRAIN = Policy(
    name="ray-train",
    standbys=0,
    elastic=False,  # DeepSpeed's ZeRO checkpoints fit one world size
    memory=False,
    memory_every_s="auto",
    memory_block_s=0.0,
    memory_restore_s=0.0,
    memory_survives=(),
    storage_every_s="auto",  # stock at its best: Young's interval
    storage_block_s=LOCAL_SAVE_S,  # stock at its best: asynchronous upload
    storage_write_s=STORAGE_WRITE_S,
    storage_restore_s=STORAGE_RESTORE_S,
    detect_process_s=0.5,  # stock at its best: health check every 0.2 s
    detect_hang_s=NCCL_TIMEOUT_S,
    detect_node_s=60.0,  # Ray's node health check: about a minute
    detect_island_s=60.0,
    detect_corruption_s=NOTICED_CORRUPTION_S,
    takeover_s=PROCESS_START_S,
    restart_s=PROCESS_START_S,  # the whole group, whoever died
    swap_warm_s=NODE_START_S,
    swap_cold_s=NODE_START_S,
    shrink_s=PROCESS_START_S,
    grow_s=PROCESS_START_S,
    straggler_notice_s=86_400.0,  # assumed: somebody looks once a day
)

DLROVER = Policy(
    name="dlrover",
    standbys=0,
    elastic=False,
    memory=True,
    memory_every_s=100.0,  # published: every 10 steps
    memory_block_s=0.2,  # published
    memory_restore_s=10.0,  # assumed: out of the agent's shared memory
    memory_survives=("process", "hang"),  # the copy is on the node itself
    storage_every_s="auto",
    storage_block_s=0.2,  # persisted by the agent from the same copy
    storage_write_s=STORAGE_WRITE_S,
    storage_restore_s=STORAGE_RESTORE_S,
    detect_process_s=5.0,  # the agent looks at its processes every 5 s
    detect_hang_s=NCCL_TIMEOUT_S,
    detect_node_s=45.0,  # Kubernetes gives up a silent node after 40-50 s
    detect_island_s=45.0,
    detect_corruption_s=NOTICED_CORRUPTION_S,
    takeover_s=PROCESS_START_S,
    restart_s=PROCESS_START_S,
    swap_warm_s=NODE_START_S,
    swap_cold_s=NODE_START_S,
    shrink_s=PROCESS_START_S,
    grow_s=PROCESS_START_S,
    straggler_notice_s=86_400.0,
)

POLICIES = {policy.name: policy for policy in (OURS, RAY_TRAIN, DLROVER)}
