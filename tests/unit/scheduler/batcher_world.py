"""A worker's shell in miniature: runs plans with a made-up model and plays the scheduler's part.

The model: the token after a prefix is a hash of the prefix, so every split, chunk and handoff must
produce the same answers as the loop in `expected_answer`.
"""

from dataclasses import dataclass, field
from hashlib import sha256

from diptych.engine.core.config import BatchOptions
from diptych.engine.core.hashing import extend_chain, hash_root
from diptych.engine.core.messages import (
    Assign,
    Grant,
    Grants,
    Join,
    Joined,
    Message,
    Progress,
    Seal,
    Send,
    TokenBatch,
)
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import FinishInfo, Sample, StepPlan, StepResult, TokenLogprobs
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import FinishReason, Role, blocks_for, pack_ids, unpack_ids
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.commands import ClearBlock, CommitBlock

BLOCK = 16
VOCAB = 50
EOS = frozenset({2, 3})
MAX_LEN = 256
EPOCH = 5
WORKER_EPOCH = 7
ROOT = hash_root("test")


def next_token(tokens: list[int], *, masked: bool = False) -> int:
    token = sha256(pack_ids(tokens)).digest()[0] % VOCAB
    return token + 10 if masked and token < 10 else token


def request_of(name: str, prompt: list[int], priority: int = 0, **params: object) -> Request:
    rank = int(name) if name.isdigit() else 0
    options: dict[str, object] = {"max_tokens": 20, "stop_token_ids": [5]} | params
    resolved = SamplingParams(**options)  # type: ignore[arg-type]  # the tests' own keywords
    return Request(name, pack_ids(prompt), resolved, rank, priority, ROOT)


def expected_answer(request: Request) -> tuple[list[int], FinishInfo]:
    """The slow, obvious loop."""
    params, tokens = request.params, unpack_ids(request.prompt_ids)
    answer: list[int] = []
    while True:
        token = next_token(tokens, masked=len(answer) < params.min_tokens)
        tokens.append(token)
        answer.append(token)
        if len(answer) >= params.min_tokens:
            if token in EOS and not params.ignore_eos:
                return answer, FinishInfo(FinishReason.STOP)
            if token in params.stop_token_ids:
                return answer, FinishInfo(FinishReason.STOP, token)
        if len(answer) == params.max_tokens or len(tokens) >= MAX_LEN:
            return answer, FinishInfo(FinishReason.LENGTH)


def logprobs_of(token: int, wanted: bool) -> TokenLogprobs | None:
    return TokenLogprobs(token, -float(token), 1, []) if wanted else None


def run_plan(plan: StepPlan) -> StepResult:
    """The made-up model: also checks that a plan is what the contract says."""
    result = StepResult([], compute_s=0.001)
    assert plan.num_tokens == sum(row.length for row in plan.rows)
    for i, row in enumerate(plan.rows):
        seq = row.seq
        assert row.start == seq.num_computed
        assert row.length >= 1
        assert row.start + row.length <= len(seq.block_table) * BLOCK
        assert row.sample == (row.start + row.length == len(seq.tokens))
        assert i >= plan.num_decodes or (row.length == 1 and row.sample)
        masked = seq.num_emitted < seq.request.params.min_tokens
        sample = None
        if row.sample:
            token = next_token(seq.tokens, masked=masked)
            wanted = seq.request.params.logprobs is not None
            sample = Sample(token, logprobs_of(token, wanted))
        result.samples.append(sample)
        if seq.want_prompt_logprobs:
            ends = range(row.start + 1, min(row.start + row.length + 1, seq.num_prompt))
            result.prompt_logprobs[i] = [
                TokenLogprobs(seq.tokens[j], -float(j), 1, []) for j in ends
            ]
    return result


@dataclass
class Heard:
    """What reached the client about one sequence; checks order and repeats."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishInfo | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Shell:
    """One batcher, its page, and everything it said."""

    def __init__(self, worker: int, options: BatchOptions, dial: int = 50) -> None:
        self.worker = worker
        self.batcher = Batcher(
            worker,
            WORKER_EPOCH + worker,
            options,
            block_size=BLOCK,
            eos_token_ids=EOS,
            max_model_len=MAX_LEN,
        )
        self.page: dict[int, int] = {}  # block -> generation voided for
        self.committed: dict[int, CommitBlock] = {}
        self.progress: list[Progress] = []
        self.batches: list[TokenBatch] = []
        self.joined: list[Joined] = []
        self.out: list[Send] = []
        self.plans: list[StepPlan] = []
        self.batcher.handle(Join(EPOCH, WORKER_EPOCH + worker, dial))
        self.drain()

    def drain(self) -> list[Message]:
        """Carry out the commands; returns what was sent."""
        sent: list[Message] = []
        for command in self.batcher.take():
            if isinstance(command, ClearBlock):
                self.page[command.block] = command.generation
            elif isinstance(command, CommitBlock):
                assert self.page[command.block] == command.generation, "voided before written"
                self.committed[command.block] = command
            else:
                self.out.append(command)
                sent.append(command.message)
                self._note(command.message)
        self.batcher.check_integrity()
        return sent

    def _note(self, message: Message) -> None:
        if isinstance(message, Progress):
            self.progress.append(message)
        elif isinstance(message, TokenBatch):
            self.batches.append(message)
        elif isinstance(message, Joined):
            self.joined.append(message)

    def step(self) -> list[Message]:
        """One step, or none if nothing can run; returns what was sent."""
        plan = self.batcher.plan()
        sent = self.drain()
        for row in plan.rows:  # every block that is written was voided for its generation
            first, last = row.start // BLOCK, (row.start + row.length - 1) // BLOCK
            for i in range(first, last + 1):
                assert self.page.get(row.seq.block_table[i]) == row.seq.generations[i]
        self.plans.append(plan)
        if not plan.empty:
            self.batcher.commit(plan, run_plan(plan))
        return sent + self.drain()

    def assign(
        self,
        request: Request,
        blocks: list[int],
        role: Role = Role.LOCAL,
        *,
        choice: int = 0,
        attempt: int = 0,
        emitted: list[int] | None = None,
        num_computed: int = 0,
        peer: tuple[int, int] | None = None,
        api: int = 0,
        want_prompt_logprobs: bool = False,
    ) -> SeqRef:
        ref = SeqRef(request.id, choice, attempt)
        ids = request.prompt_ids + pack_ids(emitted or [])
        assign = Assign(
            scheduler_epoch=EPOCH,
            worker_epoch=WORKER_EPOCH + self.worker,
            ref=ref,
            request=request,
            role=role,
            emitted=pack_ids(emitted or []),
            hashes=extend_chain(request.root, ids, BLOCK),
            block_table=blocks,
            generations=[block + 1000 for block in blocks],
            num_computed=num_computed,
            api=api,
            api_epoch=1,
            peer=peer,
            want_prompt_logprobs=want_prompt_logprobs,
        )
        self.batcher.handle(assign)
        return ref

    def grant(self, ref: SeqRef, first: int, blocks: list[int]) -> None:
        generations = [block + 1000 for block in blocks]
        epoch = WORKER_EPOCH + self.worker
        self.batcher.handle(Grants(EPOCH, epoch, [Grant(ref, first, blocks, generations)]))

    def seals(self) -> list[Seal]:
        return [send.message for send in self.out if isinstance(send.message, Seal)]


def hear(*shells: Shell) -> dict[SeqRef, Heard]:
    """Every sequence's tokens, each index once: repeats must agree, gaps are errors."""
    heard: dict[SeqRef, Heard] = {}
    for shell in shells:
        for batch in shell.batches:
            for item in batch.items:
                one = heard.setdefault(item.ref, Heard())
                assert item.first_index <= len(one.ids), "a gap"
                for i, token in enumerate(item.ids, item.first_index):
                    if i < len(one.ids):
                        assert one.ids[i] == token
                        continue
                    one.ids.append(token)
                    if item.logprobs is not None:
                        one.logprobs.append(item.logprobs[i - item.first_index])
                if item.prompt_logprobs is not None:
                    one.prompt_logprobs = item.prompt_logprobs
                if item.finish is not None:
                    assert one.finish is None
                    one.finish = item.finish
    return heard


def check_chain(shell: Shell, request: Request, answer: list[int]) -> None:
    """Every committed block of the sequence has its place in the hash chain."""
    chain = extend_chain(request.root, request.prompt_ids + pack_ids(answer), BLOCK)
    for progress in shell.progress:
        for block in progress.committed:
            if block.ref.request == request.id:
                assert block.hash == chain[block.index]
                assert block.parent == (chain[block.index - 1] if block.index else request.root)
                assert shell.committed[block.block].hash == block.hash


def blocks_of(start: int, tokens: int) -> list[int]:
    return list(range(start, start + blocks_for(tokens, BLOCK)))
