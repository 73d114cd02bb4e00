"""Token shards: what was written is what is read, in an order that knows no world size."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.errors import CorruptError, DataError
from tigerbot.tokens import Mixture, Packed, TokenShards, permuted, write_shards

T = 16


def shards(folder: Path, count: int, first: int = 0) -> TokenShards:
    rows = [np.full(T, first + i) for i in range(count)]
    packed = [Packed(ids, np.ones(T, bool), np.arange(T) == 0) for ids in rows]
    write_shards(folder, packed, T, tokenizer_hash="t", vocab_size=70_000, pad_id=0)
    return TokenShards(folder, T)


@given(st.integers(1, 300), st.integers(0, 5))
def test_an_epoch_visits_every_sequence_once(size: int, seed: int) -> None:
    assert sorted(permuted(i, size, (seed, 0, 0)) for i in range(size)) == list(range(size))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    return Mixture([(shards(folder / "a", 7), 3.0), (shards(folder / "b", 5, 100), 1.0)], seed=3)


@settings(max_examples=25, deadline=None)
@given(world_size=st.sampled_from([1, 2, 4]), resumed_at=st.integers(0, 40))
def test_the_order_is_the_same_for_every_world_size_and_after_every_resume(
    mixture: Mixture, world_size: int, resumed_at: int
) -> None:
    whole = mixture.places(0, 48)

    by_rank = [mixture.places(resumed_at + rank, 1)[0] for rank in range(8)]
    fresh = Mixture(list(zip(mixture.shards, mixture.weights.tolist(), strict=True)), seed=3)

    assert by_rank == whole[resumed_at : resumed_at + 8]
    assert [place for start in range(0, 48, world_size) for place in fresh.places(start, world_size)] == whole


@given(st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_every_source_is_within_one_sequence_of_its_share(mixture: Mixture, drawn: int) -> None:
    sources = [source for source, _ in mixture.places(0, drawn)]

    assert abs(sources.count(0) - 0.75 * drawn) <= 1


def test_labels_leave_out_document_starts_and_padding(tmp_path: Path) -> None:
    ids = np.array([1, 5, 2, 1, 6, 2] + [0] * (T - 6))
    starts = np.isin(np.arange(T), [0, 3])
    write_shards(tmp_path / "s", [Packed(ids, ids > 0, starts)], T, tokenizer_hash="t", vocab_size=10, pad_id=0)

    batch = TokenShards(tmp_path / "s").batch([0])

    assert batch.labels[0, :6].tolist() == [-100, 5, 2, -100, 6, 2] and (batch.labels[0, 6:] == -100).all()
    assert batch.position_ids[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.attention_mask[0].sum() == 6


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    shards(tmp_path / "s", 3)
    data = bytearray((tmp_path / "s/ids.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "s/ids.bin").write_bytes(data)

    with pytest.raises(CorruptError, match=r"ids\.bin.*differs from its manifest"):
        TokenShards(tmp_path / "s")


def test_shards_of_a_newer_program_are_refused_and_cut_off_ones_named(tmp_path: Path) -> None:
    shards(tmp_path / "s", 1)
    manifest = tmp_path / "s/manifest.json"
    text = manifest.read_text()

    manifest.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match="has format version 2, this program reads up to 1; use a newer program"):
        TokenShards(tmp_path / "s")
    manifest.write_text(text[:40])
    with pytest.raises(CorruptError, match=r"manifest\.json is not JSON"):
        TokenShards(tmp_path / "s")


def test_what_is_no_shard_folder_or_does_not_fit_says_so(tmp_path: Path) -> None:
    shards(tmp_path / "s", 1)

    with pytest.raises(DataError, match="no manifest"):
        TokenShards(tmp_path)
    with pytest.raises(DataError, match="16 tokens, the spec wants 32"):
        TokenShards(tmp_path / "s", 32)
    with pytest.raises(DataError, match="outside the vocabulary"):
        packed = Packed(np.full(T, 99), np.ones(T, bool), np.arange(T) == 0)
        write_shards(tmp_path / "bad", [packed], T, tokenizer_hash="t", vocab_size=50, pad_id=0)
    assert not (tmp_path / "bad").exists()
