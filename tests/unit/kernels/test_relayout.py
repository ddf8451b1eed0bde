"""Conversions between block layouts, for both backends: what was written is found again."""

from random import Random

import pytest
import torch
from torch import Tensor

from diptych.kernels import Kernels
from diptych.kernels.cpp import CppKernels
from diptych.kernels.reference import ReferenceKernels
from diptych.kernels.relayout import BlockLayout, Converter

LAYERS, HEADS, DIM, BLOCKS = 2, 3, 8, 5
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.int8, torch.int8),
]


def layout(block_size: int, num_tokens: int, dtype: torch.dtype, panels: bool) -> BlockLayout:
    parts = num_tokens // block_size
    return BlockLayout(LAYERS, HEADS, DIM, block_size, parts, dtype, panels)


def write(kernels: Kernels, shape: BlockLayout, memory: memoryview, values: Tensor) -> None:
    """values: [layers, 2, blocks * tokens, heads, dim] fp32, by the kernels themselves."""
    sizes = (BLOCKS * shape.num_parts, LAYERS, 2, HEADS, shape.block_size, shape.row)
    pool = torch.frombuffer(memory, dtype=shape.dtype).view(sizes)
    slots = torch.arange(BLOCKS * shape.num_tokens, dtype=torch.int32)
    for layer in range(LAYERS):
        keys, others = values[layer, 0].contiguous(), values[layer, 1].contiguous()
        kernels.write_kv(pool[:, layer, 0], pool[:, layer, 1], keys, others, slots)


@pytest.mark.parametrize("kernels", [CppKernels(), ReferenceKernels()], ids=["cpp", "reference"])
@pytest.mark.parametrize("sizes", [(16, 32), (32, 16), (16, 64), (64, 32), (32, 64), (16, 16)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_blocks_are_as_if_they_had_been_written_here(
    kernels: Kernels, sizes: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """The oracle: the kernels write the same tokens, rounded by the source, to the own layout."""
    panels, num_tokens = isinstance(kernels, CppKernels), max(sizes)
    theirs = layout(sizes[0], num_tokens, dtypes[0], panels)
    mine = layout(sizes[1], num_tokens, dtypes[1], panels)
    torch.manual_seed(sum(sizes))
    values = torch.randn(LAYERS, 2, BLOCKS * num_tokens, HEADS, DIM)
    if dtypes[0] != torch.int8:
        values = values.to(dtypes[0]).float()
    source = memoryview(bytearray(BLOCKS * theirs.num_bytes))
    own, right = (memoryview(bytearray(BLOCKS * mine.num_bytes)) for _ in range(2))
    write(kernels, theirs, source, values)
    write(kernels, mine, right, values)
    rng, size = Random(str((sizes, dtypes))), mine.num_bytes
    from_, to = rng.sample(range(BLOCKS), 3), rng.sample(range(BLOCKS), 3)
    Converter(theirs, source, mine, own)(from_, to)
    for a, b in zip(from_, to, strict=True):
        assert own[b * size : (b + 1) * size] == right[a * size : (a + 1) * size]
    for block in set(range(BLOCKS)) - set(to):
        assert own[block * size : (block + 1) * size] == bytes(size), "nothing else is written"


def test_layouts_of_other_shapes_do_not_meet() -> None:
    theirs = layout(16, 16, torch.float32, True)
    others = [
        BlockLayout(LAYERS, HEADS, DIM // 2, 16, 1, torch.float32, True),
        BlockLayout(LAYERS, HEADS + 1, DIM, 16, 1, torch.float32, True),
        layout(32, 32, torch.float32, True),
        layout(16, 16, torch.float32, False),
        layout(16, 16, torch.int8, True),
    ]
    for mine in others:
        source = memoryview(bytearray(BLOCKS * theirs.num_bytes))
        own = memoryview(bytearray(BLOCKS * mine.num_bytes))
        with pytest.raises(AssertionError):
            Converter(theirs, source, mine, own)
