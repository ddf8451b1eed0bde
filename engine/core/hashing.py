"""The prefix cache's names for blocks: a chain of SHA-256 over units of 16 tokens.

Owns nothing. Invariant: two blocks have the same hash only if the same tokens stood before them
and in them, under the same numerics fingerprint and salt. Hashes are per 16-token unit, so block
sizes 16, 32 and 64 meet: a block's hash is that of its last unit.
"""

from hashlib import sha256
from hmac import digest
from typing import Final

from diptych.engine.core.types import HASH_UNIT_TOKENS, BlockHash

_UNIT_BYTES: Final = HASH_UNIT_TOKENS * 4


def hash_root(fingerprint: str, salt: bytes = b"") -> BlockHash:
    """The parent of every first block under one numerics fingerprint and salt."""
    return sha256(b"diptych-root\0" + fingerprint.encode() + b"\0" + salt).digest()


def cache_salt(server_key: bytes, salt: str) -> bytes:
    """The salt of a request: unguessable without the server's key; empty text shares the cache."""
    return digest(server_key, salt.encode(), "sha256") if salt else b""


def extend_chain(parent: BlockHash, ids: bytes, block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks in `ids` (packed int32), the first one following `parent`."""
    block_bytes = block_size * 4
    hashes: list[BlockHash] = []
    for start in range(0, len(ids) - block_bytes + 1, block_bytes):
        for unit in range(start, start + block_bytes, _UNIT_BYTES):
            parent = sha256(parent + ids[unit : unit + _UNIT_BYTES]).digest()
        hashes.append(parent)
    return hashes
