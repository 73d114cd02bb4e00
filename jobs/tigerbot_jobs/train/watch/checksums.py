"""Silent corruption: replicas whose bits must agree and do not, and a step that gives other bits the second time.

Under ZeRO 0-2 all ranks hold the same weights after every step, so a digest of eight bytes a rank is compared, and the
minority is the culprit. ZeRO 3 has no replica to compare; there a step is replayed. A digest is of bits, not values:
a NaN, a negative zero or a changed last bit counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import xxhash
from torch import Tensor

_CHUNK_WORDS = 1 << 20  # 8 MB at a time, and 8 MB of weights: what the device path needs beside the tensors
_HORNER = 0x5851F42D4C957F2D  # odd, so no information is lost from one chunk to the next
_SIGN = 1 << 63


@dataclass(frozen=True)
class Vote:
    """Whether replicas agree, and who does not.

    Args:
        odd: ranks outside the majority; empty where there is no majority, whatever else is known.
    """

    agree: bool
    odd: tuple[int, ...]
    evidence: str


@dataclass(frozen=True)
class Replay:
    """A step done more than once from the same state.

    Args:
        deterministic: at least two runs gave the same bits; if not, replaying says nothing about the hardware.
    """

    matches: bool
    deterministic: bool
    evidence: str


@torch.no_grad()
def replica_digest(tensors: Iterable[Tensor]) -> Tensor:
    """A 64-bit digest of tensors of any dtype, in their order, as an int64 tensor of shape () on their device.

    On the CPU xxh3 over the memory; elsewhere a sum of 8-byte words with pseudo-random odd weights, which finds any
    single flipped bit for certain and two exchanged words. Digests of different kinds of device do not compare.
    """
    words = [tensor.detach().contiguous() for tensor in tensors]
    if all(tensor.device.type == "cpu" for tensor in words):
        digest = xxhash.xxh3_64()
        for tensor in words:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return torch.tensor(_signed(digest.intdigest()), dtype=torch.int64)
    return _weighted_digest(words)


def vote(digests: Sequence[Hashable] | Tensor) -> Vote:
    """Compare the digests of all ranks, in rank order."""
    values = digests.flatten().tolist() if isinstance(digests, Tensor) else list(digests)
    if len(set(values)) <= 1:
        return Vote(True, (), f"all {len(values)} ranks hold the same bits")
    usual, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return Vote(False, (), f"{len(values)} ranks hold {len(set(values))} different states and none has a majority")
    odd = tuple(rank for rank, value in enumerate(values) if value != usual)
    named = ", ".join(map(str, odd))
    return Vote(False, odd, f"rank {named} of {len(values)} holds other bits than the {count} that agree")


def odd_ranks(digests: Sequence[Hashable] | Tensor) -> list[int]:
    """Ranks that a majority contradicts."""
    return list(vote(digests).odd)


def replay_matches(run: Callable[[], Hashable], restore: Callable[[], None]) -> Replay:
    """Do one step twice from the same state and compare bits; where they differ, a third time decides.

    Args:
        run: does the step and gives a digest of its result (an int, bytes, or a tuple of them by rank).
        restore: puts the state back to before the step; also called at the end, so that training can go on from there.
    """
    seen: list[Hashable] = []
    for _ in range(2):
        restore()
        seen.append(run())
    if seen[0] == seen[1]:
        restore()
        return Replay(True, True, "the step gave the same bits twice")
    restore()
    seen.append(run())
    restore()
    if len(set(seen)) == 3:
        text = "the step gave three different results: it is not deterministic, so this says nothing of the hardware"
        return Replay(False, False, text)
    odd = next(index for index, one in enumerate(seen) if seen.count(one) == 1)
    where = _parts(seen[odd], seen[odd - 1])
    return Replay(
        False, True, f"run {odd + 1} of 3 of the same step gave other bits{where}: a transient fault of this machine"
    )


def _parts(odd: Hashable, usual: Hashable) -> str:
    """Which ranks' results differ, where a result is a tuple by rank."""
    if not isinstance(odd, tuple) or not isinstance(usual, tuple):
        return ""
    ranks = [str(rank) for rank, (one, other) in enumerate(zip(odd, usual, strict=True)) if one != other]
    return f" on rank {', '.join(ranks)}"


def _weighted_digest(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    longest = max((tensor.numel() * tensor.element_size() + 7) // 8 for tensor in tensors)
    weights = _weights(1 << min(longest, _CHUNK_WORDS).bit_length(), device)
    digest = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        words = _as_words(tensor)
        for begin in range(0, len(words), _CHUNK_WORDS):
            part = words[begin : begin + _CHUNK_WORDS]
            digest = digest * _HORNER + (part * weights[: len(part)]).sum() + len(part)
    return digest


def _as_words(tensor: Tensor) -> Tensor:
    """The memory of a tensor as int64, the last word filled with zeros."""
    flat = tensor.reshape(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    if whole == len(flat) and flat.data_ptr() % 8 == 0:
        return flat.view(torch.int64)
    filled = torch.zeros((len(flat) + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
    filled[: len(flat)] = flat
    return filled.view(torch.int64)


@lru_cache(maxsize=32)
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers: splitmix64's mixing of the index, in wrapping int64 arithmetic."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return mixed | 1


def _signed(value: int) -> int:
    return value - 2 * _SIGN if value >= _SIGN else value
