"""Names for the plain values that travel, and the packing of token ids.

Owns nothing. Invariant: everything here is immutable and needs only the standard library, so the
scheduler, the simulator and the torch-free supervisor can import it.
"""

from array import array
from collections.abc import Iterable
from enum import StrEnum
from sys import byteorder
from typing import Final

RequestId = str  # "<api number>-<counter>-<random>", unique for the life of a server
BlockId = int  # index of a block in its pool
Generation = int  # counter of a block, raised before it can be reused
BlockHash = bytes  # 32 bytes, chained SHA-256
WorkerId = int
PoolId = int
ApiId = int
Epoch = int

HASH_UNIT_TOKENS: Final = 16
"""The prefix cache hashes units of this many tokens; a block size is a multiple of it."""

KV_SCALE_BYTES: Final = 4
"""Of int8 KV: each token's row of a head has an fp32 scale of its own, which is in the pool too."""

STEP_SIZES: Final = 16
"""Classes of steps by their tokens: up to 1, 2, 4, ... 2^14, and more."""


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words (`abort` and `error` are ours)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Role(StrEnum):
    """What one assignment asks of a worker. A worker may hold all three kinds at once."""

    LOCAL = "local"  # prefill here, then decode here
    PREFILL = "prefill"  # prefill here, sample token 0, seal to the peer
    DECODE = "decode"  # wait for the peer's seal, then decode


class LossCause(StrEnum):
    """Why a running attempt was taken away; the API server submits the next one."""

    WORKER = "worker"  # a worker was fenced
    FAULT = "fault"  # a worker crashed by its own fault while it held this sequence
    PREEMPTED = "preempted"
    MOVED = "moved"  # its worker leaves, the next attempt runs elsewhere


class DownCause(StrEnum):
    """How a worker ended."""

    KILLED = "killed"  # from outside, or an orderly exit
    FAULT = "fault"  # SEGV, BUS, FPE, ABRT, ILL or an uncaught exception
    HUNG = "hung"  # progress counter still, fenced by the supervisor


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as int32 little-endian bytes: 4 bytes a token, encoded without a loop in Python."""
    packed = array("i", ids)
    if byteorder != "little":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises ValueError if the length is no multiple of 4."""
    ids = array("i")
    ids.frombytes(data)
    if byteorder != "little":
        ids.byteswap()
    return ids.tolist()


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def step_size(num_tokens: int) -> int:
    """The class of a step of so many tokens, one of `STEP_SIZES`: i for at most 2^i."""
    return min(max(num_tokens - 1, 0).bit_length(), STEP_SIZES - 1)
