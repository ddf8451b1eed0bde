"""Decode steps in one call give what any other step gives: random requests, batches and tables."""

import math
import random
from collections.abc import Sequence as Seq
from itertools import pairwise

import pytest
from torch import Tensor

from bench.oracle import VOCAB_SIZE
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import Sample, StepPlan, StepRow
from diptych.engine.core.request import Request, SeqRef, Sequence
from diptych.engine.core.types import Role, blocks_for, pack_ids
from diptych.engine.decode_batch import DecodeBatch
from diptych.engine.pool import KVPool
from diptych.engine.runner import LoadedModel, Runner, make_runner
from diptych.engine.sampling import NOT_FINITE, Sampler
from tests.unit.engine.models import BACKEND, tiny_model

BLOCK = 32
NUM_BLOCKS = 600
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, seed=0)
DRAWN = SamplingParams(temperature=1.0, max_tokens=40, seed=0)


def _sequence(name: str, prompt: list[int], params: SamplingParams) -> Sequence:
    """Without blocks."""
    request = Request(name, pack_ids(prompt), params, 0)
    return Sequence(
        ref=SeqRef(name, 0, 0),
        request=request,
        role=Role.LOCAL,
        tokens=list(prompt),
        num_computed=0,
        block_table=[],
        generations=[],
        hashes=[],
        num_committed=0,
        num_cached=0,
    )


def _params(rng: random.Random, greedy: float) -> SamplingParams:
    """Of any kind; with this probability only the best token is wanted."""
    if rng.random() < greedy:
        return GREEDY
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_p=rng.choice([1.0, 0.8]),
        top_k=rng.choice([0, 5]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([None, {3: 4.0}]),
        min_tokens=rng.choice([0, 3]),
        stop_token_ids=[5],
        logprobs=rng.choice([None, 0, 3]),
        max_tokens=40,
        seed=rng.randrange(1 << 40),
    )


class Twins:
    """The same requests on two runners; the plans of the second one know of no decodes."""

    def __init__(self, model: LoadedModel, rng: random.Random, threads: int, parts: int) -> None:
        self._rng = rng
        self._free = list(range(NUM_BLOCKS))
        rng.shuffle(self._free)
        self._pairs: list[tuple[Sequence, Sequence]] = []
        pools = [
            KVPool.over(None, model.config, NUM_BLOCKS, BLOCK, num_parts=parts) for _ in range(2)
        ]
        self._runners = [make_runner(model, pool, threads) for pool in pools]

    def add(self, name: str, greedy: float) -> None:
        prompt = [self._rng.randrange(VOCAB_SIZE) for _ in range(self._rng.randint(1, 70))]
        params = _params(self._rng, greedy)
        self._pairs.append((_sequence(name, prompt, params), _sequence(name, prompt, params)))

    def end(self) -> None:
        self._pairs.pop(self._rng.randrange(len(self._pairs)))

    def step(self) -> bool:
        """One token of most sequences, in some order, behind them the prompts of new ones; whether
        there were decodes only."""
        rng = self._rng
        picked = [pair for pair in self._pairs if rng.random() < 0.9]
        if rng.random() < 0.3:
            rng.shuffle(picked)
        picked.sort(key=lambda pair: pair[0].num_emitted == 0)
        for pair in picked:
            self._grow(pair)
        num_decodes = sum(pair[0].num_emitted > 0 for pair in picked)
        results = [self._run(which, picked, num_decodes) for which in range(2)]
        assert results[0] == results[1]
        return num_decodes == len(picked) > 0

    def _run(
        self, which: int, picked: list[tuple[Sequence, Sequence]], num_decodes: int
    ) -> list[object]:
        seqs = [pair[which] for pair in picked]
        rows = [StepRow(seq, seq.num_computed, seq.num_uncomputed, True) for seq in seqs]
        total = sum(row.length for row in rows)
        plan = StepPlan(rows, total, 0 if which else num_decodes)
        result = self._runners[which].run(plan)
        for row, sample in zip(rows, result.samples, strict=True):
            assert sample is not None
            assert sample.error is None
            row.seq.num_computed += row.length
            row.seq.tokens.append(sample.token)
        return list(result.samples)

    def _grow(self, pair: tuple[Sequence, Sequence]) -> None:
        """The blocks that the next tokens need, and now and then one more."""
        needed = blocks_for(len(pair[0].tokens), BLOCK) + (self._rng.random() < 0.1)
        more = [self._free.pop() for _ in range(needed - len(pair[0].block_table))]
        for seq in pair:
            seq.block_table.extend(more)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("greedy", [0.0, 0.8, 1.0])
def test_any_batch_gives_the_same_samples(seed: int, greedy: float) -> None:
    rng = random.Random(seed)
    twins = Twins(tiny_model("llama3"), rng, threads=1 + seed % 2, parts=1 + seed % 3 % 2)
    num_decode_steps = 0
    for step in range(60):
        if step < 3 or rng.random() < 0.15:
            twins.add(f"{seed}-{step}", greedy)
        elif rng.random() < 0.05:
            twins.end()
        num_decode_steps += twins.step()
    assert num_decode_steps > 20


class _Counting(Sampler):
    """Counts the rows that it sees logits of."""

    num_rows = 0

    def sample(self, logits: Tensor, seqs: Seq[Sequence]) -> list[Sample]:
        self.num_rows += len(seqs)
        return super().sample(logits, seqs)


@pytest.mark.skipif(BACKEND == "reference", reason="the C++ library is not built")
def test_greedy_decodes_never_meet_the_sampler() -> None:
    model = tiny_model("llama3")
    pool = KVPool.over(None, model.config, 4, BLOCK)
    sampler = _Counting(model.kernels, model.config.vocab_size, model.config.eos_token_ids)
    runner = Runner(model, pool, sampler)
    seq, drawn = _sequence("0", [1, 2, 3], GREEDY), _sequence("1", [1, 2, 3], DRAWN)
    seq.block_table, drawn.block_table = [0], [1]
    rows = [StepRow(each, 2, 1, True) for each in (seq, drawn)]
    runner.run(StepPlan(rows[:1], 1, 1))
    assert sampler.num_rows == 0
    runner.run(StepPlan(rows, 2, 2))
    assert sampler.num_rows == 2
    runner.run(StepPlan(rows[:1], 1, 0))
    assert sampler.num_rows == 3


def test_a_broken_row_is_an_error_of_its_own() -> None:
    model = tiny_model("llama2")
    pool = KVPool.over(None, model.config, 4, BLOCK)
    runner = make_runner(model, pool, 1)
    well, sick = _sequence("well", [1, 2], GREEDY), _sequence("sick", [1, 2], GREEDY)
    well.block_table, sick.block_table = [0], [1]
    prompts = StepPlan([StepRow(seq, 0, 2, True) for seq in (well, sick)], 4, 0)
    first = runner.run(prompts).samples
    assert first[0] == first[1] is not None
    pool.data[1] = math.nan
    for seq in (well, sick):
        seq.tokens.append(first[0].token if first[0] else 0)
    plan = StepPlan([StepRow(seq, 2, 1, True) for seq in (sick, well)], 2, 2)
    broken, whole = runner.run(plan).samples
    assert broken is not None
    assert (broken.token, broken.error) == (-1, NOT_FINITE)
    assert whole is not None
    assert whole.error is None


@pytest.mark.parametrize("num_decodes", [0, 1])
def test_a_row_beyond_its_blocks_is_a_bug(num_decodes: int) -> None:
    model = tiny_model("llama3")
    runner = make_runner(model, KVPool.over(None, model.config, 4, BLOCK), 1)
    seq = _sequence("long", list(range(BLOCK + 1)), GREEDY)
    seq.block_table = [2]
    with pytest.raises(AssertionError, match="beyond its blocks"):
        runner.run(StepPlan([StepRow(seq, BLOCK, 1, True)], 1, num_decodes))


@pytest.mark.parametrize("parts", [1, 2])
def test_tables_are_read_when_the_batch_changes_or_is_asked_to(parts: int) -> None:
    batch = DecodeBatch(parts)
    seqs = [_sequence(str(index), [4, 5, 6 + index], GREEDY) for index in range(20)]
    for index, seq in enumerate(seqs):
        seq.block_table = [index, 50 - index]
    rows = [StepRow(seq, 2, 1, True) for seq in seqs]

    def tables() -> list[list[int]]:
        ends, blocks = batch.rows.kv_indptr.tolist(), batch.rows.kv_indices.tolist()
        return [blocks[a:b] for a, b in pairwise(ends)]

    def wanted(seq: Sequence) -> list[int]:
        return [parts * block + part for block in seq.block_table for part in range(parts)]

    batch.take(rows)
    kept = batch.seqs
    batch.take(rows)
    assert batch.seqs is kept
    assert batch.rows.ids[:20].tolist() == [6 + index for index in range(20)]
    assert batch.rows.positions[:20].tolist() == [2] * 20
    assert tables() == [wanted(seq) for seq in seqs]
    seqs[3].block_table.append(60)
    batch.take(rows)
    assert batch.seqs is kept
    batch.read_tables()
    assert tables() == [wanted(seq) for seq in seqs]
    batch.take(rows[::-1])
    assert batch.seqs == seqs[::-1]
    assert tables() == [wanted(seq) for seq in seqs[::-1]]
    batch.take(rows[:1])
    assert (batch.rows.num_rows, tables()) == (1, [wanted(seqs[0])])
    twin = _sequence("0", [4, 5, 6], GREEDY)  # equal, but another
    twin.block_table = [7, 8]
    batch.take([StepRow(twin, 2, 1, True)])
    assert batch.seqs[0] is twin
    assert tables() == [wanted(twin)]
