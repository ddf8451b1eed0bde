"""The ranks of a worker but the first: they compute the steps that rank 0 shares with them.

Owns the form in which a step travels: its index tensors and the rows that need logits, nothing of
requests or sampling. Invariant: after a step every rank has made the same calls of its collectives.
"""

from dataclasses import fields
from typing import NoReturn

import torch
from torch import Tensor

from diptych.engine.batch import ModelInput
from diptych.engine.collectives import Collectives
from diptych.engine.models.decoder import Decoder

__all__ = ["decode_step", "encode_step", "follow", "step_numbers_max"]

_NAMES = [field.name for field in fields(ModelInput)]


def encode_step(inputs: ModelInput, heads: list[Tensor]) -> Tensor:
    """[n] int32. heads: for each use of the output head, the rows of hidden states ([R] int32)."""
    tensors = [*(getattr(inputs, name) for name in _NAMES), *heads]
    lengths = [len(tensors), *(tensor.numel() for tensor in tensors)]
    return torch.cat([torch.tensor(lengths, dtype=torch.int32), *tensors])


def decode_step(numbers: Tensor) -> tuple[ModelInput, list[Tensor]]:
    """The inverse; views of `numbers`."""
    count = int(numbers[0])
    lengths: list[int] = numbers[1 : 1 + count].tolist()
    tensors = list(torch.split(numbers[1 + count :], lengths))
    named = dict(zip(_NAMES, tensors, strict=False))
    return ModelInput(**named), tensors[len(_NAMES) :]


def step_numbers_max(tokens_max: int, seqs_max: int, blocks_max: int) -> int:
    """Of a step of so many tokens and sequences, each of at most `blocks_max` blocks."""
    rows_max = min(tokens_max, seqs_max)
    heads = rows_max + tokens_max  # samples and prompt positions, and as many uses at most
    return 16 + 2 * heads + 3 * tokens_max + 3 * (rows_max + 1) + rows_max * blocks_max


def follow(decoder: Decoder, ranks: Collectives) -> NoReturn:
    """Steps until the process ends."""
    while True:
        inputs, heads = decode_step(ranks.receive())
        hidden = decoder.forward(inputs)
        for rows in heads:
            decoder.logits(hidden.index_select(0, rows))
