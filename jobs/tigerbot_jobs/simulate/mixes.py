"""Failure mixes: published counts of what interrupted large training runs, and how often.

`llama3` is table 5 of arXiv 2407.21783 by its counts (they sum to 419; its printed percentages do not match them). The
paper says neither what comes back after a reboot nor what has to be repaired: that column is ours. `meta-rsc` is the
rate measured for 1,024-card jobs on Meta's shared research clusters (arXiv 2410.21680), with Llama 3's causes, since
that paper gives no counts for jobs of this size. These tables were written down before the first comparison and are
not fitted to any goodput.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tigerbot.spec import FaultKind

KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
LLAMA3_CARD_HOURS = 16_384 * 54 * 24 / 419  # 50,677: cards x hours / unexpected interruptions
LLAMA3_PLANNED_PER_DAY = 47 / 54
META_RSC_CARD_HOURS = 1_024 * 7.9  # 8,090, from the job's mean time to failure of 7.9 h


@dataclass(frozen=True)
class Cause:
    """One row of a mix.

    Attributes:
        nodes: taken by an event of kind island; 0 is the whole island.
        soft: share that a restart of the processes cures.
        detect_s, recover_s: instead of the policy's, where given.
    """

    name: str
    count: float
    kind: FaultKind = "node"
    repair: Literal["reboot", "hardware"] = "hardware"
    nodes: int = 0
    soft: float = 0.0
    detect_s: float | None = None
    recover_s: float | None = None


@dataclass(frozen=True)
class Mix:
    """Card-hours between interruptions of one card's job, and the causes by weight."""

    card_hours: float
    causes: tuple[Cause, ...]


_LLAMA3 = (
    Cause("faulty-gpu", 148),
    Cause("gpu-hbm3", 72),
    Cause("software-bug", 54, kind="process"),
    Cause("network-switch-cable", 35, kind="island"),
    Cause("host-maintenance", 32, repair="reboot"),
    Cause("gpu-sram", 19),
    Cause("gpu-system-processor", 17, repair="reboot"),
    Cause("nic", 7),
    Cause("nccl-watchdog", 7, kind="hang"),
    Cause("silent-data-corruption", 6, kind="corruption"),
    Cause("gpu-thermal", 6),
    Cause("ssd", 3),
    Cause("power-supply", 3),
    Cause("server-chassis", 2),
    Cause("io-expansion-board", 2),
    Cause("dependency", 2, kind="process"),
    Cause("cpu", 2),
    Cause("system-memory", 2),
)

MIXES = {"llama3": Mix(LLAMA3_CARD_HOURS, _LLAMA3), "meta-rsc": Mix(META_RSC_CARD_HOURS, _LLAMA3)}
