"""Reads between pools as data: which blocks, in how few pieces, and what came of them.

Owns nothing. Invariant: spans cover exactly the pairs (source block, own block) that they were made
from, in order, and a span is contiguous on both sides.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from diptych.engine.core.types import BlockId, Epoch, Generation, PoolId, WorkerId

PIECE_BYTES_MAX: Final = 8 << 20
PIECE_BYTES_MIN: Final = 2 << 20


class Span(msgspec.Struct, frozen=True, array_like=True):
    """`count` neighbouring blocks of the source go to `count` neighbouring own blocks."""

    source: BlockId
    own: BlockId
    count: int


class Read(msgspec.Struct, frozen=True):
    """Puller -> shell: read these spans; answered by `ReadDone` or `ReadFailed`, exactly once."""

    handle: int
    peer: tuple[WorkerId, Epoch]
    pool: PoolId
    endpoint: str
    spans: list[Span]


class CancelRead(msgspec.Struct, frozen=True):
    """Puller -> shell: its outcome does not matter any more; still answered once it is drained."""

    handle: int


class ReadDone(msgspec.Struct, frozen=True):
    """Shell -> puller: the bytes are here. Lists are per block, in the order of the spans.

    `generations` were read at the source after the data; `digests` are of the own copies.
    """

    handle: int
    generations: list[Generation]
    digests: list[int]


class ReadFailed(msgspec.Struct, frozen=True):
    """Shell -> puller: the read is drained and proves nothing about its own blocks."""

    handle: int
    reason: str
    lost: bool = False  # the source is out of reach: asking again would only cost time
    refused: bool = False  # the two ends do not go together, and never will as they are


def coalesce(source: Sequence[BlockId], own: Sequence[BlockId]) -> list[Span]:
    """The fewest spans, in order."""
    return _runs(source, own) if source else []


def _runs(source: Sequence[BlockId], own: Sequence[BlockId]) -> list[Span]:
    spans: list[Span] = []
    first, first_own, count = source[0], own[0], 0
    for block, mine in zip(source, own, strict=True):
        if block == first + count and mine == first_own + count:
            count += 1
            continue
        spans.append(Span(first, first_own, count))
        first, first_own, count = block, mine, 1
    spans.append(Span(first, first_own, count))
    return spans


def source_blocks(spans: Sequence[Span]) -> list[BlockId]:
    """The blocks of the source that are read, in order."""
    return [block for span in spans for block in range(span.source, span.source + span.count)]


def own_blocks(spans: Sequence[Span]) -> list[BlockId]:
    """The own blocks that they are read into, in order."""
    return [block for span in spans for block in range(span.own, span.own + span.count)]


def cut(count: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Pieces [first, end) of so many blocks: none is more than half of what is left, so that
    little is left to digest when the last one is here; few, since each costs a call."""
    most, least = (max(1, size // block_bytes) for size in (PIECE_BYTES_MAX, PIECE_BYTES_MIN))
    first = 0
    while first < count:
        left = count - first
        size = min(left, max(least, min(most, left // 2)))
        yield first, first + size
        first += size
