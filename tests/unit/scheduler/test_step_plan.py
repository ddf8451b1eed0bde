"""How prompts are cut into chunks, above all where another pool reads them chunk by chunk."""

import random

import pytest

from diptych.engine.core.config import BatchOptions
from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import Assign, Handoff, Join
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Role, blocks_for
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.step_plan import TAPERED_TOKENS_MIN, chunk_length
from tests.unit.scheduler.batcher_world import BLOCK, EPOCH, VOCAB, request_of, run_plan

MAX_LEN = 8192


def steps_of(
    prompts: list[int], options: BatchOptions, far: bool = False
) -> list[list[tuple[int, int]]]:
    """(prompt, tokens of its chunk) in each step, as a prefill worker's batcher plans prompts of so
    many tokens that come at once; `far`: for another pool."""
    batcher = Batcher(
        0, 1, options, block_size=BLOCK, eos_token_ids=frozenset(), max_model_len=MAX_LEN
    )
    batcher.handle(Join(EPOCH, 1, 100))
    rng, blocks = random.Random(sum(prompts)), 0
    for number, num_tokens in enumerate(prompts):
        request = request_of(str(number), [rng.randrange(10, VOCAB) for _ in range(num_tokens)])
        table = [blocks + i for i in range(blocks_for(num_tokens, BLOCK))]
        blocks += len(table)
        assign = Assign(
            scheduler_epoch=EPOCH,
            worker_epoch=1,
            ref=SeqRef(request.id, 0, 0),
            request=request,
            role=Role.PREFILL,
            emitted=b"",
            hashes=extend_chain(request.root, request.prompt_ids, BLOCK),
            block_table=table,
            generations=[1] * len(table),
            num_computed=0,
            api=0,
            api_epoch=1,
            peer=(1, 1),
            want_prompt_logprobs=False,
            handoff=Handoff(1, 0, [], []) if far else None,
        )
        batcher.handle(assign)
    steps = []
    while not (plan := batcher.plan()).empty:
        steps.append([(int(row.seq.ref.request), row.length) for row in plan.rows])
        batcher.commit(plan, run_plan(plan))
        batcher.take()
    return steps


def chunks_of(num_tokens: int, options: BatchOptions, far: bool) -> list[int]:
    return [length for step in steps_of([num_tokens], options, far) for _, length in step]


@pytest.mark.parametrize(
    ("num_tokens", "near", "far"),
    [
        (2048, [512] * 4, [512, 512, 512, 256, 128, 128]),
        (700, [512, 188], [336, 176, 188]),  # the last one is the rest, under two of the least
        (255, [255], [255]),
        (256, [256], [128, 128]),
        (40, [40], [40]),
    ],
)
def test_chunks_get_shorter_where_another_pool_reads_them(
    num_tokens: int, near: list[int], far: list[int]
) -> None:
    options = BatchOptions(max_num_batched_tokens=512)
    assert chunks_of(num_tokens, options, far=False) == near
    assert chunks_of(num_tokens, options, far=True) == far


def test_a_cap_of_the_chunk_holds() -> None:
    options = BatchOptions(max_num_batched_tokens=512, max_chunk_tokens=200)
    assert chunks_of(600, options, far=True) == [192, 192, 192, 24]


@pytest.mark.parametrize(
    ("enough", "steps"),
    [
        (
            128,
            [[(0, 64), (1, 64)], [(2, 100), (3, 40)], [(4, 512)], [(4, 188)], [(5, 64), (6, 64)]],
        ),
        (
            100,
            [[(0, 64), (1, 64)], [(2, 100)], [(3, 40), (4, 464)], [(4, 236)], [(5, 64), (6, 64)]],
        ),
        (
            4096,
            [
                [(0, 64), (1, 64), (2, 100), (3, 40), (4, 240), (5, 4)],
                [(4, 460), (5, 44), (6, 8)],
                [(5, 16), (6, 56)],
            ],
        ),
    ],
)
def test_prompts_share_a_step_until_it_has_enough_of_them(
    enough: int, steps: list[list[tuple[int, int]]]
) -> None:
    options = BatchOptions(max_num_batched_tokens=512, prefill_batch_tokens=enough)
    assert steps_of([64, 64, 100, 40, 700, 64, 64], options) == steps


@pytest.mark.parametrize("seed", range(20))
def test_any_chunks_cover_the_prompt_and_end_with_blocks(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    most, block_size = rng.choice((16, 100, 512, 4096)), rng.choice((16, 32, 64))
    start, end = rng.randrange(0, 200), rng.randrange(200, 5000)
    while start < end:
        length = chunk_length(start, end, most, block_size, pulled=True)
        assert 0 < length <= min(most, end - start)
        if start + length < end:
            assert (start + length) % block_size == 0 or length < block_size
            assert 2 * length <= end - start or end - start < 2 * TAPERED_TOKENS_MIN
        else:
            assert length < 2 * TAPERED_TOKENS_MIN
        start += length
