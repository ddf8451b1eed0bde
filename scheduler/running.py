"""One sequence on one worker, seen by the batcher: its phase, its limits and where its tokens go.

Owns what is derived from a `Sequence` so that an uneventful decode step looks at two numbers only.
Invariant: while `len(tokens) < event` a new token that is not in `stops` changes nothing but
`tokens` and `num_computed`.
"""

from dataclasses import dataclass, field
from enum import Enum

from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import (
    Address,
    Assign,
    CommittedBlock,
    Handoff,
    Seal,
    Tokens,
)
from diptych.engine.core.plan import FinishInfo, Sample, TokenLogprobs
from diptych.engine.core.request import SeqRef, Sequence
from diptych.engine.core.types import (
    BlockHash,
    Epoch,
    FinishReason,
    Role,
    WorkerId,
    pack_ids,
    unpack_ids,
)
from diptych.scheduler.commands import BatcherCommand, ClearBlock


class Phase(Enum):
    """Where a sequence stands in its batcher."""

    AWAITING_SEAL = "awaiting seal"  # its blocks belong to the peer, or are being pulled
    PULLING = "pulling"  # the first blocks of its prompt come from another pool
    PREFILL = "prefill"  # some of its prompt is to be computed
    DECODE = "decode"  # one token per step
    STARVED = "starved"  # needs a block; a grant brings it back
    ENDED = "ended"  # finished, sealed or given back


@dataclass(slots=True, eq=False)
class Outbox:
    """The tokens of one step for one API server."""

    to: Address
    num_users: int = 0  # sequences that send here
    items: list[Tokens] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Running:
    """A `Sequence` and what its batcher knows of it."""

    seq: Sequence
    tokens: list[int]  # seq.tokens itself
    ref: SeqRef
    num_prompt: int
    num_cached: int
    order: tuple[int, int, int]  # of prefills: priority, rank, choice
    stops: frozenset[int]
    min_len: int  # tokens below which no stop token ends the sequence
    limit: int  # tokens at which the sequence ends by length
    phase: Phase
    peer: tuple[WorkerId, Epoch] | None
    outbox: Outbox
    event: int = 0  # len(tokens) at which a decode step is not uneventful; 0 before decode
    seal: Seal | None = None  # received, its token not yet repeated to the client
    filled: list[CommittedBlock] = field(default_factory=list)  # full once the planned chunk is
    handoff: Handoff | None = None  # the peer is in another memory domain
    pulling: bool = False  # some of its blocks are not here yet
    early_seal: Seal | None = None  # came before the last of its blocks
    num_published: int = 0  # blocks of the table that the peer may read, or has
    head: int | None = None  # of another worker's prompt: tokens to compute here, or cached there

    @property
    def prefill_end(self) -> int:
        """Tokens to be computed before the sequence is sealed, or decodes."""
        if self.head is not None and self.seq.role is Role.PREFILL:
            return self.head
        return len(self.tokens)

    def cached_of(self, num_here: int) -> int:
        """Tokens of the prompt that some prefix cache knew, when the first `num_here` are here."""
        return min(num_here, self.num_prompt, num_here if self.head is None else self.head)

    def next_event(self, block_size: int) -> int:
        """len(tokens) when the next block is full, or at the limit: `num_computed` is one less."""
        full = ((len(self.tokens) - 1) // block_size + 1) * block_size + 1
        return min(full, self.limit)

    def room(self, block_size: int) -> int:
        """Tokens that fit in the blocks granted so far, beyond those computed."""
        return len(self.seq.block_table) * block_size - self.seq.num_computed

    def finish(self, eos: frozenset[int]) -> FinishInfo | None:
        """Whether the last token ended the sequence."""
        token = self.tokens[-1]
        if token in self.stops and len(self.tokens) >= self.min_len:
            is_eos = token in eos and not self.seq.request.params.ignore_eos
            return FinishInfo(FinishReason.STOP, None if is_eos else token)
        if len(self.tokens) >= self.limit:
            return FinishInfo(FinishReason.LENGTH)
        return None

    def voided(self, first: int) -> list[BatcherCommand]:
        """Voids the page entries of the blocks from table index `first` on: they get written."""
        table, generations = self.seq.block_table[first:], self.seq.generations[first:]
        return [ClearBlock(b, g) for b, g in zip(table, generations, strict=True)]

    def plan_chunk(self, end: int, block_size: int) -> None:
        """Name the blocks that the next chunk fills, before its step: the client waits after it."""
        self.filled = self._full_by(end, block_size)

    def commit_full(self, block_size: int) -> list[CommittedBlock]:
        """Blocks that became full since the last call, with their place in the hash chain."""
        seq = self.seq
        full = self.filled or self._full_by(seq.num_computed, block_size)
        self.filled = []
        seq.num_committed += len(full)
        assert seq.num_committed * block_size <= seq.num_computed
        return full

    def _full_by(self, num_computed: int, block_size: int) -> list[CommittedBlock]:
        """Blocks full at `num_computed` and not committed yet."""
        seq = self.seq
        first, last = seq.num_committed, num_computed // block_size
        if first >= last:
            return []
        hashes = self._hashes(last, block_size)
        parent = hashes[first - 1] if first else seq.request.root
        full: list[CommittedBlock] = []
        for index in range(first, last):
            name = hashes[index]
            block, generation = seq.block_table[index], seq.generations[index]
            full.append(CommittedBlock(self.ref, index, block, generation, name, parent))
            parent = name
        return full

    def _hashes(self, count: int, block_size: int) -> list[BlockHash]:
        """Those of the first `count` blocks at least; all of them are full."""
        hashes = self.seq.hashes
        known = len(hashes)
        if known < count:
            ids = pack_ids(self.tokens[known * block_size : count * block_size])
            parent = hashes[-1] if hashes else self.seq.request.root
            hashes.extend(extend_chain(parent, ids, block_size))
        return hashes

    def news(
        self,
        sample: Sample,
        finish: FinishInfo | None,
        seal: Seal | None = None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
    ) -> Tokens:
        """For the client: the token just sampled, and before it what a seal brought along."""
        ids, entries = [sample.token], [sample.logprobs]
        if sample.error is not None:
            ids, entries = [], []
        first = len(self.tokens) - self.num_prompt - len(ids)
        if seal is not None:
            first -= 1
            ids.insert(0, seal.token)
            entries.insert(0, seal.logprobs)
            prompt_logprobs = seal.prompt_logprobs
        logprobs = [entry for entry in entries if entry is not None] or None
        return Tokens(self.ref, first, ids, logprobs, finish, self.num_cached, prompt_logprobs)

    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """To go with the first token, if they were asked for."""
        if not self.seq.want_prompt_logprobs:
            return None
        entries = [entry for entry in self.seq.prompt_logprobs if isinstance(entry, TokenLogprobs)]
        return entries[: self.num_prompt - 1]


def running_from(
    assign: Assign, outbox: Outbox, eos: frozenset[int], max_model_len: int, block_size: int
) -> Running:
    """The batcher's row for an assignment; nothing of the pool is touched."""
    request, params = assign.request, assign.request.params
    tokens = unpack_ids(request.prompt_ids) + unpack_ids(assign.emitted)
    tokens.append(0)  # room for the first token: the list moves now, not when a client waits
    tokens.pop()
    assert 0 <= assign.num_computed < len(tokens), "the last token is always computed"
    assert len(assign.block_table) == len(assign.generations)
    seq = Sequence(
        ref=assign.ref,
        request=request,
        role=assign.role,
        tokens=tokens,
        num_computed=assign.num_computed,
        block_table=list(assign.block_table),
        generations=list(assign.generations),
        hashes=list(assign.hashes),
        num_committed=assign.num_computed // block_size,
        num_cached=min(assign.num_computed, request.num_prompt),
        want_prompt_logprobs=assign.want_prompt_logprobs,
    )
    stops = frozenset() if params.ignore_eos else eos
    if params.stop_token_ids:
        stops = stops.union(params.stop_token_ids)
    limit = max_model_len
    if params.max_tokens is not None:
        limit = min(limit, request.num_prompt + params.max_tokens)
    decode = assign.role is Role.DECODE
    assert not (decode or assign.role is Role.PREFILL) or assign.peer is not None
    return Running(
        seq=seq,
        tokens=tokens,
        ref=assign.ref,
        num_prompt=request.num_prompt,
        num_cached=seq.num_cached,
        order=(request.priority, request.rank, assign.ref.choice),
        stops=stops,
        min_len=request.num_prompt + params.min_tokens,
        limit=limit,
        phase=Phase.AWAITING_SEAL if decode else Phase.PULLING if assign.prefix else Phase.PREFILL,
        peer=assign.peer,
        outbox=outbox,
        handoff=assign.handoff,
        head=assign.head,
        num_published=0 if assign.handoff is None else assign.handoff.first,
    )
