"""The control page: what survives of the blocks' meaning, and the pulse of every process.

Per block (generation, committed, hash, parent), per pulse slot a progress counter and a busy flag.
Owns the layout: columns, not rows, each word 8-byte aligned and written by one store. Invariant: an
entry is valid exactly when committed == generation > 0; the order of writes in `clear` and `commit`
keeps that true when the writer is killed between any two of them.
"""

import struct
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from diptych.engine.core.types import BlockHash, BlockId, Generation

_HASH_BYTES: Final = 32
_PULSE_WORDS: Final = 8  # one cache line: the fields of `Pulse` in order, and 3 unused
_PACK_HASH: Final = struct.Struct(f"{_HASH_BYTES}s").pack_into  # faster than a slice
_COUNTER, _BUSY, _STEP_START_NS, _STEP_END_NS, _STEPS = range(5)


class ValidEntry(msgspec.Struct, frozen=True):
    """A full block whose step is over."""

    block: BlockId
    generation: Generation
    hash: BlockHash
    parent: BlockHash


class Pulse(msgspec.Struct, frozen=True):
    """One reading of a slot; times are those of the newest step, on the host's monotonic clock."""

    counter: int
    busy: bool
    step_start_ns: int
    step_end_ns: int
    steps: int


def page_bytes(num_blocks: int, num_pulses: int) -> int:
    return generations_offset(num_pulses) + num_blocks * (16 + 2 * _HASH_BYTES)


def generations_offset(num_pulses: int) -> int:
    """Where the generations begin, u64 each, by block: for readers without this class."""
    return num_pulses * _PULSE_WORDS * 8


class ControlPage:
    """A view of the page in `memory` (at least `page_bytes` long, zeroed when new)."""

    def __init__(self, memory: memoryview, num_blocks: int, num_pulses: int) -> None:
        self.num_blocks = num_blocks
        self.num_pulses = num_pulses
        pulses = generations_offset(num_pulses)
        committed = pulses + num_blocks * 8
        hashes = committed + num_blocks * 8
        parents = hashes + num_blocks * _HASH_BYTES
        end = parents + num_blocks * _HASH_BYTES
        assert len(memory) >= end == page_bytes(num_blocks, num_pulses)
        self._pulses = memory[:pulses].cast("Q")
        self._generation = memory[pulses:committed].cast("Q")  # [num_blocks]
        self._committed = memory[committed:hashes].cast("Q")  # [num_blocks]
        self._hash = memory[hashes:parents]  # [num_blocks * 32]
        self._parent = memory[parents:end]  # [num_blocks * 32]

    def clear(self, block: BlockId, generation: Generation) -> None:
        """The caller is about to write the block: from now its entry is void."""
        assert generation > self._committed[block], "a generation is raised before reuse"
        self._generation[block] = generation

    def commit(
        self, block: BlockId, generation: Generation, hash_: BlockHash, parent: BlockHash
    ) -> None:
        """The block is full and the step that filled it is over."""
        assert self._generation[block] == generation
        assert len(hash_) == len(parent) == _HASH_BYTES
        _PACK_HASH(self._hash, block * _HASH_BYTES, hash_)
        _PACK_HASH(self._parent, block * _HASH_BYTES, parent)
        self._committed[block] = generation  # last: until here the entry stays void

    def generation(self, block: BlockId) -> Generation:
        """The block's life as of now; somebody may be writing."""
        return self._generation[block]

    def generations(self, blocks: Iterable[BlockId]) -> list[Generation]:
        """Of each, in order."""
        column = self._generation
        return [column[block] for block in blocks]

    def read_all(self) -> tuple[list[Generation], list[ValidEntry]]:
        """The generation of every block, and the valid entries; nobody may be writing."""
        generations = self._generation.tolist()
        committed = self._committed.tolist()
        entries = [
            ValidEntry(block, generation, self._bytes(self._hash, block), self._parent_of(block))
            for block, (generation, done) in enumerate(zip(generations, committed, strict=True))
            if generation == done and generation > 0
        ]
        return generations, entries

    def beat(self, slot: int) -> None:
        """Progress was made. Each slot has one writer."""
        self._pulses[slot * _PULSE_WORDS + _COUNTER] += 1

    def counter(self, slot: int) -> memoryview:
        """What `beat` adds to, for its one writer: 8 bytes."""
        first = slot * _PULSE_WORDS + _COUNTER
        return self._pulses[first : first + 1]

    def step_begin(self, slot: int) -> None:
        first = slot * _PULSE_WORDS
        self._pulses[first + _STEP_START_NS] = time.monotonic_ns()
        self._pulses[first + _STEPS] += 1
        self._pulses[first + _BUSY] = 1
        self._pulses[first + _COUNTER] += 1

    def step_end(self, slot: int) -> None:
        """The last kernel is over."""
        first = slot * _PULSE_WORDS
        self._pulses[first + _STEP_END_NS] = time.monotonic_ns()
        self._pulses[first + _BUSY] = 0
        self._pulses[first + _COUNTER] += 1

    def pulse(self, slot: int) -> Pulse:
        first = slot * _PULSE_WORDS
        counter, busy, start, end, steps = self._pulses[first : first + 5].tolist()
        return Pulse(counter, bool(busy), start, end, steps)

    def release(self) -> None:
        """Lets go of the memory, so that it can be unmapped."""
        for view in (self._pulses, self._generation, self._committed, self._hash, self._parent):
            view.release()

    def _bytes(self, column: memoryview, block: BlockId) -> bytes:
        return bytes(column[block * _HASH_BYTES : (block + 1) * _HASH_BYTES])

    def _parent_of(self, block: BlockId) -> bytes:
        return self._bytes(self._parent, block)
