"""The pool's layout over one buffer; index tensors against loops that say what they mean."""

import mmap
import random

import pytest
import torch

from bench.drive import Driver
from diptych.engine.batch import build_input
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.pool import KVPool
from tests.unit.engine.models import tiny_model

CONFIG = tiny_model("llama3").config  # 3 layers, 2 KV heads of 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_one_piece_of_the_buffer(dtype: torch.dtype) -> None:
    config = tiny_model("llama3", dtype).config
    block_bytes = config.block_bytes(16)
    buffer = mmap.mmap(-1, 5 * block_bytes)
    pool = KVPool.over(memoryview(buffer), config, 5, 16)
    assert pool.data.shape == (5, 3, 2, 2, 16, 16)
    assert (pool.num_blocks, pool.block_size, pool.data.dtype) == (5, 16, dtype)
    for layer in range(3):
        keys, values = pool.layer(layer)
        keys[3], values[3] = 1.0, 2.0
    content = bytes(buffer)
    assert not any(content[: 3 * block_bytes])
    assert not any(content[4 * block_bytes :])
    piece = torch.frombuffer(bytearray(content[3 * block_bytes : 4 * block_bytes]), dtype=dtype)
    halves = piece.view(3, 2, -1)  # layer, key or value
    assert bool((halves[:, 0] == 1.0).all())
    assert bool((halves[:, 1] == 2.0).all())


def test_two_pools_over_one_buffer_are_one_memory() -> None:
    buffer = mmap.mmap(-1, 4 * CONFIG.block_bytes(32))
    first, second = (KVPool.over(buffer, CONFIG, 4, 32) for _ in range(2))
    first.layer(1)[0][2, 1, 5] = 7.0
    assert float(second.layer(1)[0][2, 1, 5, 0]) == 7.0


def test_a_pool_without_buffer_is_zero() -> None:
    assert not KVPool.over(None, CONFIG, 2, 16).data.any()


def test_a_pool_larger_than_its_buffer_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="too small"):
        KVPool.over(mmap.mmap(-1, 4096), CONFIG, 100, 16)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("block_size", [16, 32])
def test_index_tensors(seed: int, block_size: int) -> None:
    rng = random.Random(seed)
    driver = Driver(tiny_model("llama3"), 128, block_size)
    rows: list[StepRow] = []
    for _ in range(rng.randint(1, 6)):
        seq = driver.add([rng.randrange(160) for _ in range(rng.randint(1, 120))], 1)
        start = rng.randrange(len(seq.tokens))
        rows.append(StepRow(seq, start, rng.randint(1, len(seq.tokens) - start), True))
    total = sum(row.length for row in rows)
    inputs = build_input(StepPlan(rows, total, 0), block_size)
    for name in inputs.__slots__:
        tensor = getattr(inputs, name)
        assert tensor.dtype == torch.int32, name
        assert tensor.is_contiguous(), name
    token = 0
    for index, row in enumerate(rows):
        assert int(inputs.qo_indptr[index]) == token
        blocks = inputs.kv_indices[inputs.kv_indptr[index] : inputs.kv_indptr[index + 1]].tolist()
        end = row.start + row.length
        assert int(inputs.kv_len[index]) == end
        assert blocks == row.seq.block_table[: -(-end // block_size)]
        for position in range(row.start, end):
            block = row.seq.block_table[position // block_size]
            assert int(inputs.ids[token]) == row.seq.tokens[position]
            assert int(inputs.positions[token]) == position
            assert int(inputs.slot_mapping[token]) == block * block_size + position % block_size
            token += 1
    assert int(inputs.qo_indptr[-1]) == token == total
    assert int(inputs.kv_indptr[-1]) == len(inputs.kv_indices)


def test_a_row_beyond_its_blocks_is_a_bug() -> None:
    driver = Driver(tiny_model("llama3"))
    seq = driver.add(list(range(40)), 1)
    seq.block_table.pop()
    with pytest.raises(AssertionError, match="beyond its blocks"):
        build_input(StepPlan([StepRow(seq, 0, 40, True)], 40, 0), 16)
    with pytest.raises(AssertionError, match="outside its sequence"):
        build_input(StepPlan([StepRow(seq, 30, 11, True)], 11, 0), 16)
