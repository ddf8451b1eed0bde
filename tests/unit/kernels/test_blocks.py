"""Checked copies of blocks against slices and the `xxhash` package."""

import mmap
import os
from random import Random

import pytest
from xxhash import xxh3_64_intdigest

from diptych.kernels import blocks
from diptych.kernels.blocks import copy_blocks, digest_blocks


def digest(memory: memoryview) -> int:
    return digest_blocks(memory, [0], len(memory))[0]


SIZES = [256, 257, 319, 320, 1023, 1024, 1025, 1088, 2048, 4096, 32768, 32769, 100_000]


@pytest.mark.parametrize("size", SIZES)
def test_digest_is_that_of_the_package(size: int) -> None:
    memory = memoryview(Random(size).randbytes(size))
    assert digest(memory) == xxh3_64_intdigest(memory)


def test_a_short_piece_has_the_packages_digest_too() -> None:
    memory = memoryview(b"short")
    assert digest(memory) == xxh3_64_intdigest(b"short")


@pytest.mark.parametrize("block_bytes", [128, 256, 1000, 4096])
@pytest.mark.parametrize("native", [True, False])
def test_scattered_copies(block_bytes: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(blocks, "_native", lambda: None)
    rng, count = Random(block_bytes), 20
    source = memoryview(rng.randbytes(count * block_bytes))  # read-only
    own = memoryview(mmap.mmap(-1, count * block_bytes))
    expected = bytearray(own)
    theirs, mine = rng.sample(range(count), 12), rng.sample(range(count), 12)
    digests = copy_blocks(own, mine, source, theirs, block_bytes)
    for a, b, found in zip(theirs, mine, digests, strict=True):
        piece = source[a * block_bytes : (a + 1) * block_bytes]
        expected[b * block_bytes : (b + 1) * block_bytes] = piece
        assert found == xxh3_64_intdigest(piece)
    assert own == expected


def test_a_block_outside_the_pool_is_refused() -> None:
    own, source = memoryview(bytearray(1024)), memoryview(os.urandom(1024))
    for mine, theirs in (([4], [0]), ([0], [4])):
        with pytest.raises(AssertionError):
            copy_blocks(own, mine, source, theirs, 256)
        with pytest.raises(AssertionError):
            digest_blocks(own, [max(mine + theirs)], 256)
    assert own == bytes(1024)


def test_every_bit_counts() -> None:
    rng, size = Random(7), 4096
    memory = bytearray(rng.randbytes(size))
    right = digest(memoryview(memory))
    for bit in rng.sample(range(8 * size), 500):
        memory[bit // 8] ^= 1 << bit % 8
        assert digest(memoryview(memory)) != right
        memory[bit // 8] ^= 1 << bit % 8
