"""What a rank reads: its part of every global batch. The whole state of reading is one integer, the step.

Global batch s is sequences `s * B .. (s + 1) * B` of the mixture's order whatever the world size (on island i of n it is
batch s * n + i of that order); it is cut into micro batches, and rank r of w takes the r-th contiguous part of them. This
module knows nothing about models or optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tigerbot.errors import DataError, SpecError
from tigerbot.spec import DataSource, TrainSpec
from tigerbot.tokens import IGNORE, Batch, Mixture, TokenShards

VALIDATION_SEQUENCES = 64  # of each source: held-out loss to about 1%, in about a second


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut, the same on every rank.

    Attributes:
        sequences: B, of a global batch, over all ranks.
        micro: of one forward pass, at most.
        micro_steps: forward passes of every rank in one step. Where the ranks do not divide the batch some of these
            are empty: every rank must take part in every reduction.
        steps: optimizer steps of the whole run (of each island, where there are several).
        island: which of the `islands` this is.
    """

    sequences: int
    micro: int
    micro_steps: int
    steps: int
    island: int = 0
    islands: int = 1

    def first_sequence(self, step: int) -> int:
        """Where global batch `step` begins: islands take the batches of the one order in turn."""
        return (step * self.islands + self.island) * self.sequences

    def spans(self, rank: int, world_size: int) -> list[tuple[int, int]]:
        """(first sequence of the global batch, how many) of every micro batch of a rank, contiguous over the ranks."""
        cuts = [(begin, min(self.micro, self.sequences - begin)) for begin in range(0, self.sequences, self.micro)]
        each, more = divmod(len(cuts), world_size)
        begin = rank * each + min(rank, more)
        mine = cuts[begin : begin + each + (rank < more)]
        return mine + [(0, 0)] * (self.micro_steps - len(mine))


def plan_batches(spec: TrainSpec, world_size: int) -> BatchPlan:
    """The plan of a spec on `world_size` ranks.

    Raises:
        SpecError: the batch is not whole sequences, or has fewer than there are ranks.
    """
    loop, length = spec.train, spec.data.sequence_length
    sequences, rest = divmod(loop.batch_tokens, length)
    if rest or not sequences:
        raise SpecError(
            f"train.batch_tokens: got {loop.batch_tokens}, wants a multiple of data.sequence_length {length}",
            where=spec.name,
            fix=f"set it to {max(1, sequences) * length}",
        )
    if sequences < world_size:
        raise SpecError(
            f"train.batch_tokens: {sequences} sequences cannot be shared by {world_size} workers",
            where=spec.name,
            fix=f"set it to {world_size * length}",
        )
    micro = min(loop.micro_batch, sequences // world_size)
    micro_steps = math.ceil(math.ceil(sequences / micro) / world_size)
    islands, island = (spec.islands.count, spec.islands.member or 0) if spec.islands else (1, 0)
    steps = max(1, round(loop.tokens / (sequences * length * islands)))
    return BatchPlan(sequences, micro, micro_steps, steps, island, islands)


class TrainingData:
    """The batches of a run, for any rank of any world size.

    Args:
        train: (shard folder, weight) of every source.
        validation: shard folders.
        tokenizer_hash: of the model's tokenizer.
        verify: read every byte against its checksum now.

    Raises:
        DataError: a folder is not shards, was packed with another tokenizer, or at another length.
        CorruptError: a shard differs from its checksum.
    """

    def __init__(
        self,
        train: list[tuple[Path, float]],
        validation: list[Path],
        *,
        sequence_length: int,
        tokenizer_hash: str,
        seed: int,
        verify: bool,
    ) -> None:
        def opened(folder: Path) -> TokenShards:
            # One rank reads every byte against its checksum; the others trust it, and only check sizes.
            shards = TokenShards(folder, sequence_length, verify=verify)
            check_tokenizer(shards, tokenizer_hash)
            return shards

        self._mixture = Mixture([(opened(folder), weight) for folder, weight in train], seed)
        self._validation = [opened(folder) for folder in validation]

    def micro_batches(self, index: int, plan: BatchPlan, rank: int, world_size: int) -> list[Batch]:
        """A rank's part of global batch `index`, in `plan.micro_steps` micro batches."""
        begin = plan.first_sequence(index)
        return [
            self._mixture.batch(begin + first, count) if count else _nothing(self._mixture.batch(begin, 1))
            for first, count in plan.spans(rank, world_size)
        ]

    def validation_batches(self, micro: int, rank: int, world_size: int) -> list[Batch]:
        """A rank's part of the held-out sequences, the same at every call."""
        found = []
        for shards in self._validation:
            mine = np.arange(min(VALIDATION_SEQUENCES, len(shards)))[rank::world_size]
            found += [shards.batch(mine[at : at + micro]) for at in range(0, len(mine), micro)]
        return found


def _nothing(batch: Batch) -> Batch:
    """A micro batch without a label: it costs a forward pass of one sequence and adds nothing to loss or gradient."""
    return replace(batch, labels=np.full_like(batch.labels, IGNORE))


def check_tokenizer(shards: TokenShards, wanted: str) -> None:
    """Raises: DataError: the shards were packed with another tokenizer than the model's."""
    if shards.tokenizer_hash != wanted:
        raise DataError(
            f"was packed with tokenizer {shards.tokenizer_hash}, the model's is {wanted}",
            where=str(shards.folder),
            fix="pack it with the model's tokenizer, or set model.tokenizer",
        )


def prepared(source: DataSource, folder: Path, tokenizer: str, sequence_length: int) -> Path:
    """The shard folder of a source: its own, or its text packed into `folder` once."""
    if source.format == "tokens":
        return Path(source.path)
    if not (folder / "manifest.json").exists():
        from tigerbot_jobs.data.job import pack_file

        pack_file(source.path, source.format, tokenizer, sequence_length, folder)
    return folder
