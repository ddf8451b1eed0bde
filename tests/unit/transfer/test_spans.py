"""Pieces of what is to be read."""

import random

import pytest

from diptych.transfer.spans import PIECE_BYTES_MAX, PIECE_BYTES_MIN, cut

MIB = 1 << 20


def test_pieces_get_smaller_towards_the_end() -> None:
    assert list(cut(128, 32 << 10)) == [(0, 64), (64, 128)]
    sizes = [(end - first) * 32 // 1024 for first, end in cut(2048, 32 << 10)]
    assert sizes == [8, 8, 8, 8, 8, 8, 8, 4, 2, 2]  # MiB
    assert list(cut(3, 5 * MIB)) == [(0, 1), (1, 2), (2, 3)]  # no smaller than a block
    assert list(cut(1, 64)) == [(0, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_cover_the_row_in_order(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    count, block_bytes = rng.randrange(1, 5000), rng.choice((64, 4096, 100_000, 3 * MIB))
    at = 0
    for first, end in cut(count, block_bytes):
        assert first == at < end
        size, left = (end - first) * block_bytes, (count - first) * block_bytes
        assert size <= max(PIECE_BYTES_MAX, block_bytes)
        assert 2 * size <= left or size <= max(PIECE_BYTES_MIN, block_bytes)
        at = end
    assert at == count
