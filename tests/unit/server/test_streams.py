"""What waits for a reader comes in one piece per choice: nothing lost, doubled or out of order."""

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest

from diptych.engine.core.messages import SchedulerUp, TokenBatch, Tokens
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import FinishReason
from diptych.scheduler.journal import Journal
from diptych.server.client import Delta, EngineInfo
from diptych.server.streams import Streams

INFO = EngineInfo(
    model_path="m",
    dtype="float32",
    vocab_size=100,
    max_model_len=100,
    eos_token_ids=[1],
    block_size=16,
    num_blocks=8,
    fingerprint="test",
)
NUM_TOKENS = 40


def item(choice: int, index: int, count: int) -> Tokens:
    """Tokens [index, index + count) of a choice; token i of choice c is 10 * c + i % 10."""
    ids = [10 * choice + i % 10 for i in range(index, index + count)]
    entries = [TokenLogprobs(token, -1.0, 1, []) for token in ids]
    ended = index + count == NUM_TOKENS
    finish = FinishInfo(FinishReason.LENGTH) if ended else None
    first = [TokenLogprobs(7, -2.0, 1, [])] if not (index or choice) else None
    return Tokens(SeqRef("r", choice, 0), index, ids, entries, finish, 3, first)


async def read(stream: AsyncGenerator[Delta, None], deltas: list[Delta]) -> None:
    async for delta in stream:
        deltas.append(delta)


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_reader_gets_the_same_tokens_in_fewer_pieces(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    deltas: list[Delta] = []

    async def run() -> int:
        streams = Streams(Journal(0, 1, block_size=16), INFO, lambda sends: None)
        streams.handle(SchedulerUp(1))
        params = SamplingParams(n=2, max_tokens=NUM_TOKENS, logprobs=0, prompt_logprobs=0)
        stream = streams.stream("r", [5, 6], params)
        reader = asyncio.create_task(read(stream, deltas))
        await asyncio.sleep(0)
        num_items, places = 0, [0, 0]
        while min(places) < NUM_TOKENS:
            choice = rng.choice([c for c in (0, 1) if places[c] < NUM_TOKENS])
            count = min(rng.randint(1, 3), NUM_TOKENS - places[choice])
            streams.handle(TokenBatch(1, 0, 1, [item(choice, places[choice], count)]))
            places[choice] += count
            num_items += 1
            if rng.random() < 0.2:
                streams.flush()
                await asyncio.sleep(0)  # the reader runs
        streams.flush()
        await reader
        return num_items

    num_items = asyncio.run(run())
    assert len(deltas) < num_items
    for choice in (0, 1):
        mine = [delta for delta in deltas if delta.choice == choice]
        place = 0
        for delta in mine:
            assert delta.first_index == place
            place += len(delta.ids)
            assert [entry.token for entry in delta.logprobs or ()] == delta.ids
            assert delta.num_cached == 3
        assert [token for delta in mine for token in delta.ids] == [
            10 * choice + i % 10 for i in range(NUM_TOKENS)
        ]
        assert [delta.finish is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
    carriers = [delta for delta in deltas if delta.prompt_logprobs is not None]
    assert [(delta.choice, delta.first_index) for delta in carriers] == [(0, 0)]
