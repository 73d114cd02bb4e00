"""What a rank reads: its part of every global batch. The whole state of reading is one integer, the step.

Global batch s is sequences `s * B .. (s + 1) * B` of the mixture's order whatever the world size (on island i of n it
is batch s * n + i of that order); rank r of w takes the r-th contiguous part of it, in micro batches. This module knows nothing about models or optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tigerbot.errors import DataError, SpecError
from tigerbot.spec import DataSource, TrainSpec
from tigerbot.tokens import Batch, Mixture, TokenShards

VALIDATION_SEQUENCES = 64  # of each source: held-out loss to about 1%, in about a second


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut.

    Attributes:
        sequences: B, of a global batch, over all ranks.
        per_rank: of one rank in one step.
        micro: of one forward pass.
        steps: optimizer steps of the whole run (of each island, where there are several).
        island: which of the `islands` this is.
    """

    sequences: int
    per_rank: int
    micro: int
    steps: int
    island: int = 0
    islands: int = 1

    def first_sequence(self, step: int) -> int:
        """Where global batch `step` begins: islands take the batches of the one order in turn."""
        return (step * self.islands + self.island) * self.sequences

    @property
    def micro_steps(self) -> int:
        return -(-self.per_rank // self.micro)


def plan_batches(spec: TrainSpec, world_size: int) -> BatchPlan:
    """The plan of a spec on `world_size` ranks.

    Raises:
        SpecError: the batch cannot be cut evenly.
    """
    loop, length = spec.train, spec.data.sequence_length
    sequences, rest = divmod(loop.batch_tokens, length)
    if rest or not sequences:
        raise SpecError(
            f"train.batch_tokens: got {loop.batch_tokens}, wants a multiple of data.sequence_length {length}",
            where=spec.name,
            fix=f"set it to {max(1, sequences) * length}",
        )
    if sequences % world_size:
        raise SpecError(
            f"train.batch_tokens: {sequences} sequences cannot be shared by {world_size} workers",
            where=spec.name,
            fix=f"set it to {-(-sequences // world_size) * world_size * length}",
        )
    per_rank = sequences // world_size
    islands, island = (spec.islands.count, spec.islands.member or 0) if spec.islands else (1, 0)
    steps = max(1, round(loop.tokens / (sequences * length * islands)))
    return BatchPlan(sequences, per_rank, min(loop.micro_batch, per_rank), steps, island, islands)


class TrainingData:
    """The batches of one rank.

    Args:
        train: (shard folder, weight) of every source.
        validation: shard folders.
        tokenizer_hash: of the model's tokenizer.

    Raises:
        DataError: a folder is not shards, was packed with another tokenizer, or at another length.
        CorruptError: a shard differs from its checksum.
    """

    def __init__(
        self,
        train: list[tuple[Path, float]],
        validation: list[Path],
        *,
        plan: BatchPlan,
        sequence_length: int,
        tokenizer_hash: str,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        def opened(folder: Path) -> TokenShards:
            # Rank 0 reads every byte against its checksum; the others trust it, and only check sizes.
            shards = TokenShards(folder, sequence_length, verify=rank == 0)
            check_tokenizer(shards, tokenizer_hash)
            return shards

        self._mixture = Mixture([(opened(folder), weight) for folder, weight in train], seed)
        self._validation = [opened(folder) for folder in validation]
        self._plan, self._rank, self._world_size = plan, rank, world_size

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of global batch `step`, in micro batches."""
        plan = self._plan
        begin = plan.first_sequence(step) + self._rank * plan.per_rank
        cuts = range(0, plan.per_rank, plan.micro)
        return [self._mixture.batch(begin + cut, min(plan.micro, plan.per_rank - cut)) for cut in cuts]

    def validation_batches(self) -> list[Batch]:
        """This rank's part of the held-out sequences, the same at every call."""
        found = []
        for shards in self._validation:
            mine = np.arange(min(VALIDATION_SEQUENCES, len(shards)))[self._rank :: self._world_size]
            found += [shards.batch(mine[at : at + self._plan.micro]) for at in range(0, len(mine), self._plan.micro)]
        return found


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
