"""Every random number of a simulation, a stream of its own for each purpose, all from one seed."""

from __future__ import annotations

import numpy as np

from tigerbot_jobs.simulate.mixes import KINDS
from tigerbot_jobs.simulate.setting import Setting

_PROCESS, _HANG, _NODE, _ISLAND = (KINDS.index(kind) for kind in ("process", "hang", "node", "island"))


class Draws:
    """Random times and choices for subsets of replicas."""

    def __init__(self, setting: Setting, seed: int) -> None:
        names = ("failure", "cause", "repair", "human", "restore", "planned", "straggler")
        seeds = np.random.SeedSequence(seed).spawn(len(names))
        self._of = {name: np.random.Generator(np.random.SFC64(one)) for name, one in zip(names, seeds, strict=True)}
        self._setting = setting
        causes = setting.causes
        weights = np.array([cause.count for cause in causes], dtype=float)
        self._upto = np.cumsum(weights) / weights.sum()
        self._upto[-1] = 1.0
        self._kind = np.array([KINDS.index(cause.kind) for cause in causes])
        self._soft = np.array([cause.soft for cause in causes])
        self._hardware = np.array([cause.repair == "hardware" for cause in causes])
        self._nodes = np.array([_hits(cause.kind, cause.nodes, setting.nodes_per_island) for cause in causes])

    def failure_s(self, now_s: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Time of the next failure while `nodes` nodes are exposed.

        A power law of the fleet's age with as many failures over the horizon as an exponential: the next one is
        where the expected count has grown by an exponential amount. Shape 1 is the exponential itself.
        """
        setting = self._setting
        grown = self._of["failure"].standard_exponential(len(now_s)) * setting.node_mtbf_s
        shape = setting.weibull_shape
        with np.errstate(divide="ignore"):
            if shape == 1.0:
                return now_s + grown / nodes
            whole = setting.horizon_s
            return whole * ((now_s / whole) ** shape + grown / nodes / whole) ** (1 / shape)

    def fault(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cause (its row), kind, nodes lost and whether their repair is hardware, for `count` failures."""
        rng = self._of["cause"]
        cause = np.searchsorted(self._upto, rng.random(count), side="right")
        kind, lost = self._kind[cause], self._nodes[cause].astype(float)
        setting = self._setting
        soft = np.maximum(self._soft[cause], np.where(kind == _NODE, setting.soft_share, 0))
        if soft.any():
            cured = rng.random(count) < soft
            lost = np.where(cured, 0.0, lost)
            # The node stays, and what is in its memory; corrupt memory stays corrupt.
            kind = np.where(cured & ((kind == _NODE) | (kind == _ISLAND)), _PROCESS, kind)
        if setting.hang_share:
            hangs = (kind <= _NODE) & (rng.random(count) < setting.hang_share)
            kind = np.where(hangs & (lost == 0), _HANG, kind)
        return cause, kind, lost, self._hardware[cause]

    def chance(self, stream: str, count: int) -> np.ndarray:
        """`count` uniform numbers of a stream."""
        return self._of[stream].random(count)

    def repair_s(self, hardware: np.ndarray) -> np.ndarray:
        """How long each node is away."""
        normal = self._of["repair"].standard_normal(len(hardware))
        slow, quick = self._setting.hardware, self._setting.reboot
        return np.where(hardware, slow[0] * np.exp(slow[1] * normal), quick[0] * np.exp(quick[1] * normal))

    def human_s(self, count: int) -> np.ndarray:
        """How long a person takes: 0 where none is needed."""
        setting = self._setting
        if setting.human_probability == 0:
            return np.zeros(count)
        rng = self._of["human"]
        median_s, sigma = setting.human
        takes = median_s * np.exp(sigma * rng.standard_normal(count))
        return np.where(rng.random(count) < setting.human_probability, takes, 0.0)

    def every_s(self, stream: str, mean_s: float, count: int) -> np.ndarray:
        """Exponential times with this mean; infinite ones for an infinite mean."""
        if np.isinf(mean_s):
            return np.full(count, np.inf)
        return self._of[stream].standard_exponential(count) * mean_s


def _hits(kind: str, nodes: int, island: int) -> int:
    if kind in ("process", "hang"):
        return 0
    return (nodes or island) if kind == "island" else 1
