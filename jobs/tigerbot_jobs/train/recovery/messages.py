"""What hub, workers and keepers say to each other: one JSON object a line over TCP.

Every message is a frozen dataclass; `wire.py` makes lines of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Hello:
    """First line of every connection. `role` is `worker`, `keeper` (it serves shards at `address`) or `standing`.

    `node` is what the machine is called, `ray_node` Ray's id of it, which changes when Ray starts anew.
    """

    token: str
    role: str
    worker: str
    node: str
    host: str
    address: str
    pid: int
    ray_node: str = ""


@dataclass(frozen=True)
class Ready:
    """A worker has imported and opened everything: it can take a rank."""


@dataclass(frozen=True)
class ShardAt:
    """A shard image: `size` bytes from `offset` of a file on a node; its keeper serves it at `address`."""

    path: str
    offset: int
    size: int
    node: str
    address: str
    step: int
    generation: int
    rank: int
    world_size: int
    zero_stage: int


@dataclass(frozen=True)
class Form:
    """Take this rank in this generation, and begin from `step`: from these shards, from storage, or from nothing.

    `skips` are the global batches that are left out, `[first, last]` each; `guard` is the loss guard's state.
    """

    generation: int
    rank: int
    world_size: int
    tier: str
    step: int
    shards: list[ShardAt] = field(default_factory=list)
    key: str = ""
    skips: list[list[int]] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Meet:
    """Where the process group's store listens: from rank 0 to the hub, and on to the others."""

    generation: int
    address: str


@dataclass(frozen=True)
class Formed:
    generation: int
    seconds: float


@dataclass(frozen=True)
class Restored:
    generation: int
    step: int
    tier: str
    seconds: float


@dataclass(frozen=True)
class Pulse:
    """A worker's heartbeat. `steps` are the ledger's step rows, `own` (step, seconds outside collectives), `rows` metrics."""

    generation: int
    rank: int
    step: int
    phase: str
    seq: int
    in_phase_s: float
    cpu_s: float
    steps: list[list[float]] = field(default_factory=list)
    own: list[list[float]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Out:
    """A member has left its generation and waits. `why`: communication, bug, pause, rollback, done.

    `key` names a bug (type, frame, step); `error` is a `TigerError` that no retry mends, as its parts.
    """

    generation: int
    step: int
    why: str
    text: str = ""
    key: str = ""
    trace: str = ""
    error: dict[str, str] | None = None
    rollback_to: int = -1
    skip: list[int] | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    batch: int = -1  # the global batch a bug met


@dataclass(frozen=True)
class Saved:
    """This member's snapshot of a step is in shared memory and waits there for its keeper."""

    generation: int
    step: int
    path: str
    header: dict[str, Any]


@dataclass(frozen=True)
class Say:
    """An event for the ledger that only a worker knows."""

    kind: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Noticed:
    """From a keeper: this node is about to go, `deadline_s` from now. From a worker: this process is."""

    source: str
    deadline_s: float


@dataclass(frozen=True)
class Abort:
    """The generation is over: break out of its collectives."""

    generation: int


@dataclass(frozen=True)
class Pause:
    """Leave at the next step boundary."""

    generation: int


@dataclass(frozen=True)
class Save:
    """To rank 0: the next snapshot is to be kept in storage."""

    generation: int


@dataclass(frozen=True)
class Probe:
    """To a member: time a fixed small piece of work at your next step boundary."""

    generation: int


@dataclass(frozen=True)
class Probed:
    generation: int
    seconds: float


KEPT = "kept"


@dataclass(frozen=True)
class Stop:
    """Nothing is left to do. With reason `kept` storage has the newest state, and memory is not needed any more."""

    reason: str


@dataclass(frozen=True)
class Look:
    """To a keeper: which shards has your node?"""

    request: int


@dataclass(frozen=True)
class Held:
    request: int
    shards: list[ShardAt]


@dataclass(frozen=True)
class Persist:
    """To a keeper: put these snapshots of your node's workers into storage under `key`, as `rank-XXXXX.safetensors`."""

    request: int
    key: str
    step: int
    generation: int
    files: list[list[Any]]  # [path, rank]


@dataclass(frozen=True)
class Put:
    """A keeper's answer: `files` are manifest entries (path, size_bytes, sha256), or why there are none."""

    request: int
    files: list[dict[str, Any]]
    seconds: float
    problem: str = ""


@dataclass(frozen=True)
class Mirror:
    """To a keeper: from now on copy every new snapshot of your node to this keeper (empty: to nobody)."""

    address: str


@dataclass(frozen=True)
class Copied:
    """From a keeper: its peer has the first copy of a worker's snapshots, of this step."""

    file: str
    peer: str
    step: int


@dataclass(frozen=True)
class Kill:
    """To a keeper: dump this process's stacks, then end it."""

    request: int
    pid: int
    reason: str


@dataclass(frozen=True)
class Killed:
    request: int
    stacks: str


@dataclass(frozen=True)
class Take:
    """To a standing worker: take up this job (a `WorkerJob`, as JSON has it)."""

    job: dict[str, Any]


@dataclass(frozen=True)
class Back:
    """A standing worker has left the job it had, and waits for another."""


Message = (
    Hello | Ready | Form | Meet | Formed | Restored | Pulse | Out | Saved | Say | Noticed | Abort | Pause | Save | Probe | Probed | Stop
    | Look | Held | Persist | Put | Mirror | Copied | Kill | Killed | Take | Back
)  # fmt: skip
