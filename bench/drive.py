"""Drives a Runner by hand: sequences, blocks and plans without scheduler or batcher.

Owns the sequences of one small pool; its blocks are handed out in a shuffled order, so nothing
can rely on neighbourhood. Invariant: a plan has all decodes first, then the chunks, as the real
batcher's.
"""

import random
from collections.abc import Sequence as Seq

from torch import Tensor

from diptych.engine.core.model_config import KVDtype
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import Sample, StepPlan, StepResult, StepRow
from diptych.engine.core.request import Request, SeqRef, Sequence
from diptych.engine.core.types import Role, blocks_for, pack_ids
from diptych.engine.pool import KVPool
from diptych.engine.runner import LoadedModel, Runner
from diptych.kernels import Kernels

__all__ = ["Driver", "GreedyRecorder"]


class GreedyRecorder:
    """A sampler that takes the best token and keeps the logits it saw, per request."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.logits: dict[str, list[Tensor]] = {}  # request id -> rows [V] fp32

    def takes_best(self, seqs: Seq[Sequence]) -> bool:
        return False  # it wants to see logits

    def sample(self, logits: Tensor, seqs: Seq[Sequence]) -> list[Sample]:
        for seq, row in zip(seqs, logits, strict=True):
            self.logits.setdefault(seq.ref.request, []).append(row.clone())
        ids, _ = self._kernels.argmax_logprob(logits)
        return [Sample(token, error="NaN" if token < 0 else None) for token in ids.tolist()]


class Driver:
    """Adds prompts, then steps until each has its tokens."""

    def __init__(
        self,
        model: LoadedModel,
        num_blocks: int = 256,
        block_size: int = 16,
        threads: int = 1,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        model.kernels.set_num_threads(threads)
        self.pool = KVPool.over(None, model.config, num_blocks, block_size, dtype=kv_dtype)
        self.recorder = GreedyRecorder(model.kernels)
        self.runner = Runner(model, self.pool, self.recorder)
        self.seqs: list[Sequence] = []
        self._free = list(range(num_blocks))
        random.Random(7).shuffle(self._free)

    def add(
        self, prompt: list[int], max_tokens: int, prompt_logprobs: int | None = None
    ) -> Sequence:
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, seed=0, prompt_logprobs=prompt_logprobs
        )
        name = f"0-{len(self.seqs)}-drive"
        num_blocks = blocks_for(len(prompt) + max_tokens, self.pool.block_size)
        seq = Sequence(
            ref=SeqRef(name, 0, 0),
            request=Request(name, pack_ids(prompt), params, len(self.seqs)),
            role=Role.LOCAL,
            tokens=list(prompt),
            num_computed=0,
            block_table=[self._free.pop() for _ in range(num_blocks)],
            generations=[1] * num_blocks,
            hashes=[],
            num_committed=0,
            num_cached=0,
            want_prompt_logprobs=prompt_logprobs is not None,
        )
        self.seqs.append(seq)
        return seq

    def clear(self) -> None:
        """Forgets all sequences and takes their blocks back."""
        for seq in self.seqs:
            self._free += seq.block_table
        self.seqs.clear()

    def plan(self, chunk: int, budget: int) -> StepPlan:
        """What is left to do: one token of each decode, then chunks within the budget."""
        decodes: list[StepRow] = []
        chunks: list[StepRow] = []
        for seq in self.seqs:
            if seq.num_emitted >= (seq.request.params.max_tokens or 0) or budget <= 0:
                continue
            length = min(seq.num_uncomputed, chunk, budget)
            row = StepRow(seq, seq.num_computed, length, length == seq.num_uncomputed)
            (decodes if seq.num_emitted else chunks).append(row)
            budget -= length
        rows = decodes + chunks
        return StepPlan(rows, sum(row.length for row in rows), len(decodes))

    def step(self, chunk: int = 1 << 30, budget: int = 1 << 30) -> StepResult | None:
        """Runs one plan and takes over what it sampled; None when nothing is left."""
        plan = self.plan(chunk, budget)
        if plan.empty:
            return None
        result = self.runner.run(plan)
        for index, (row, sample) in enumerate(zip(plan.rows, result.samples, strict=True)):
            row.seq.num_computed += row.length
            row.seq.prompt_logprobs += result.prompt_logprobs.get(index, [])
            if sample is not None:
                row.seq.tokens.append(sample.token)
        return result

    def finish(self, chunk: int = 1 << 30, budget: int = 1 << 30) -> list[list[int]]:
        """Steps to the end; the emitted tokens of each sequence."""
        while self.step(chunk, budget) is not None:
            pass
        return [seq.tokens[seq.num_prompt :] for seq in self.seqs]
