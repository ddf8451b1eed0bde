"""A request as the user asked it, and a sequence as a worker computes it: two stages, two types.

`Request` is immutable and travels. `Sequence` is owned by one worker's batcher and never travels;
what another worker needs to go on is in `Assign` and `Seal` (messages.py).
"""

from dataclasses import dataclass, field

import msgspec

from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import BlockHash, BlockId, Generation, RequestId, Role


class Request(msgspec.Struct, frozen=True, array_like=True):
    """What the user asked. `params` is resolved: seed, max_tokens and bad_word_ids are set.

    `rank` orders the queue within a priority and survives resubmission (nanoseconds of arrival).
    A lower `priority` number is served first, as in vLLM.
    """

    id: RequestId
    prompt_ids: bytes  # packed int32, at least one token
    params: SamplingParams
    rank: int
    priority: int = 0
    root: BlockHash = b""  # parent hash of the first block: fingerprint and salt

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids) // 4


class SeqRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One attempt at one choice of a request: the name of a sequence in every message."""

    request: RequestId
    choice: int
    attempt: int


@dataclass(slots=True)
class Sequence:
    """One choice of a request while it computes on a worker.

    tokens: prompt, then what was emitted in earlier attempts, then what this attempt sampled
    [0, num_computed)          KV is in the pool
    [num_computed, len(tokens)) KV still to compute; 1 token while decoding
    block i of `block_table` holds the tokens [i * block_size, (i + 1) * block_size); it only grows,
    at its end
    """

    ref: SeqRef
    request: Request
    role: Role
    tokens: list[int]
    num_computed: int
    block_table: list[BlockId]
    generations: list[Generation]
    hashes: list[BlockHash]  # of the full blocks known so far, in order
    num_committed: int  # blocks already reported as full, a prefix of block_table
    num_cached: int  # tokens found in the prefix cache when assigned, for usage
    want_prompt_logprobs: bool = False
    prompt_logprobs: list[object] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return self.request.num_prompt

    @property
    def num_emitted(self) -> int:
        """Tokens sampled so far over all attempts."""
        return len(self.tokens) - self.request.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed
