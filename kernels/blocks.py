"""Digests of KV blocks, and copies that are digested on the way.

The digest is xxh3-64: in C++ where the library is built, from the `xxhash` package otherwise; both
give the same. Not cryptographic: it finds bits that were lost or mixed up on the way, not an
attacker, who has no way in. Owns nothing. Memory comes as plain buffers, read-only ones included.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from diptych.kernels import library

__all__ = ["copy_blocks", "digest_blocks"]

_BYTES_MIN: Final = 256
"""Shorter pieces, which no model has, follow other rules of the hash."""


def _address_of(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def digest_blocks(memory: memoryview, blocks: Sequence[int], block_bytes: int) -> list[int]:
    """Of each of these blocks of `memory`."""
    assert max(blocks) < len(memory) // block_bytes
    native = _native()
    if native is None or block_bytes < _BYTES_MIN:
        pieces = (memory[b * block_bytes : (b + 1) * block_bytes] for b in blocks)
        return [xxh3_64_intdigest(piece) for piece in pieces]
    digests = np.empty(len(blocks), np.int64)
    native.digests(_address_of(memory), np.array(blocks, np.int32), block_bytes, digests)
    return digests.view(np.uint64).tolist()


def copy_blocks(
    to: memoryview,
    to_blocks: Sequence[int],
    source: memoryview,
    source_blocks: Sequence[int],
    block_bytes: int,
) -> list[int]:
    """Block i of `source_blocks` over block i of `to_blocks`; the digests of the copies."""
    assert max(to_blocks) < len(to) // block_bytes
    assert max(source_blocks) < len(source) // block_bytes
    native = _native()
    if native is None or block_bytes < _BYTES_MIN:
        return [
            _copy_one(to, a * block_bytes, source, b * block_bytes, block_bytes)
            for a, b in zip(to_blocks, source_blocks, strict=True)
        ]
    digests = np.empty(len(to_blocks), np.int64)
    mine, theirs = np.array(to_blocks, np.int32), np.array(source_blocks, np.int32)
    native.copy(_address_of(to), mine, _address_of(source), theirs, block_bytes, digests)
    return digests.view(np.uint64).tolist()


def _copy_one(to: memoryview, at: int, source: memoryview, start: int, count: int) -> int:
    target = to[at : at + count]
    target[:] = source[start : start + count]
    return xxh3_64_intdigest(target)


class _Native(NamedTuple):
    digests: Callable[..., None]
    copy: Callable[..., None]


@functools.cache
def _native() -> _Native | None:
    if library.find() is None:
        return None
    lib = library.load()
    return _Native(lib.digest_blocks, lib.copy_blocks)
