"""Token logprobs against fp64 and a full sort; ties by lower id; alone as in a batch."""

import math

import pytest
import torch
from torch import Tensor

from diptych import kernels as backends
from diptych.engine.core.plan import TokenLogprobs
from diptych.engine.logprobs import token_logprobs
from tests.unit.engine.models import BACKEND

KERNELS = backends.load(BACKEND, num_threads=1)
V = 300


def rows(count: int, seed: int, *, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, V, generator=generator) * 4
    return (logits * 2).round() / 2 if ties else logits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 5, 20, V, V + 5])
def test_against_a_full_sort(seed: int, ties: bool, top_k: int) -> None:
    logits = rows(4, seed, ties=ties)
    chosen = [0, V - 1, int(logits[2].argmax()), 17]
    entries = token_logprobs(KERNELS, logits, chosen, top_k)
    exact = torch.log_softmax(logits.double(), dim=1)
    for row, token, entry, wanted in zip(logits, chosen, entries, exact, strict=True):
        order = sorted(range(V), key=lambda token: (-float(row[token]), token))
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(wanted[token]), abs=2e-6)
        assert entry.rank == 1 + order.index(token)
        assert [token for token, _ in entry.top] == order[:top_k]
        values = [float(wanted[token]) for token, _ in entry.top]
        assert [value for _, value in entry.top] == pytest.approx(values, abs=2e-6)


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    logits = rows(9, seed=1, ties=False)
    chosen = list(range(9))
    together = token_logprobs(KERNELS, logits, chosen, 5)
    for index in range(9):
        alone = token_logprobs(KERNELS, logits[index : index + 1].clone(), [index], 5)
        assert alone == [together[index]]


def test_the_logits_are_not_changed() -> None:
    logits = rows(2, seed=1, ties=False)
    before = logits.clone()
    token_logprobs(KERNELS, logits, [1, 2], 3)
    assert torch.equal(logits, before)


def test_masked_tokens_come_last() -> None:
    logits = torch.full((1, V), -math.inf)
    logits[0, [7, 3]] = 1.0
    (entry,) = token_logprobs(KERNELS, logits, [7], 4)
    assert entry.rank == 2
    assert [token for token, _ in entry.top] == [3, 7, 0, 1]
    assert entry.top[2][1] == -math.inf


def test_broken_rows_have_no_numbers() -> None:
    logits = rows(3, seed=2, ties=False)
    wanted = token_logprobs(KERNELS, logits, [5, 5, 5], 2)[1]
    logits[0, 9] = math.nan
    logits[2] = -math.inf
    entries = token_logprobs(KERNELS, logits, [5, 5, 5], 2)
    assert entries[1] == wanted
    for entry in (entries[0], entries[2]):
        assert math.isnan(entry.logprob)
        assert (entry.rank, entry.top) == (1, [])


def test_no_rows() -> None:
    empty: list[TokenLogprobs] = token_logprobs(KERNELS, torch.empty(0, V), [], 3)
    assert empty == []
