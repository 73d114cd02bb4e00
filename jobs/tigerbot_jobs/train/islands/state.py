"""What the outer server keeps on disk: the global weights, the outer momentum, and how far every island is.

One safetensors file, replaced as a whole before any island hears of the round it holds: a server that was killed goes
on where its islands believe it is.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tigerbot.errors import CorruptError, StorageError
from tigerbot_jobs.train.islands.layout import Layout

FORMAT_VERSION = 1
FILE = "outer.safetensors"
_VECTORS = ("params", "momentum", "carried")


@dataclass
class Record:
    """What is known of an island.

    Attributes:
        adopted_round: the newest round whose weights it said it had taken, at its step `adopted_step`; what it trains
            for that round began at `began_step`.
        counted_round: the newest round its delta was part of, sent at its step `counted_step`.
        dropped_steps: of its steps whose delta came too late.
        done: it has made all its steps.
    """

    adopted_round: int = -1
    adopted_step: int = 0
    began_step: int = 0
    counted_round: int = -1
    counted_step: int = 0
    dropped_steps: int = 0
    done: bool = False


@dataclass
class OuterState:
    """`carried` is what quantising the last change left out; `round` rounds are closed; `durations` of the last ones."""

    layout: Layout
    params: np.ndarray
    momentum: np.ndarray
    carried: np.ndarray
    round: int = 0
    islands: dict[int, Record] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)

    @classmethod
    def fresh(cls, layout: Layout, params: np.ndarray) -> OuterState:
        return cls(layout, params, np.zeros_like(params), np.zeros_like(params))

    def island(self, island: int) -> Record:
        return self.islands.setdefault(island, Record())

    def parameter(self, name: str) -> np.ndarray:
        return self.params[self.layout.of(name)]


def save_state(state: OuterState, folder: Path) -> None:
    about = {
        "format_version": FORMAT_VERSION,
        "round": state.round,
        "durations": state.durations,
        "sizes": state.layout.sizes,
        "islands": {str(island): asdict(record) for island, record in state.islands.items()},
    }
    staged = folder / f".{FILE}"
    save_file({name: getattr(state, name) for name in _VECTORS}, staged, metadata={"tiger": json.dumps(about)})
    with staged.open("rb+") as file:
        os.fsync(file.fileno())
    staged.replace(folder / FILE)


def load_state(folder: Path) -> OuterState | None:
    """The kept state; None where there is none.

    Raises:
        StorageError: it was written by a newer program.
        CorruptError: the file is cut off or damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["tiger"])
            # Copies: the file's own memory may not be written to.
            vectors = {name: file.get_tensor(name).copy() for name in _VECTORS}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CorruptError(
            f"is damaged ({error})", where=str(path), fix="remove it: the islands seed the server with their weights"
        ) from None
    if about["format_version"] > FORMAT_VERSION:
        raise StorageError(
            f"has format version {about['format_version']}, this program reads up to {FORMAT_VERSION}",
            where=str(path),
            fix="use a newer program",
        )
    islands = {int(island): Record(**record) for island, record in about["islands"].items()}
    return OuterState(
        Layout(about["sizes"]), **vectors, round=about["round"], islands=islands, durations=about["durations"]
    )
