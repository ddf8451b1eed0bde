"""Greedy choice and log-softmax over the vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from diptych.kernels.cpp import CppKernels
from diptych.kernels.reference import ReferenceKernels

VOCABS = [1, 5, 16, 1000, 8192, 8193, 33_000]


def _logits(rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 6


@pytest.mark.parametrize("vocab", VOCABS)
def test_equals_the_reference(cpp: CppKernels, reference: ReferenceKernels, vocab: int) -> None:
    logits = _logits(4, vocab)
    logits[1, : vocab // 2] = -math.inf
    ids, logprobs = cpp.argmax_logprob(logits)
    right_ids, right_logprobs = reference.argmax_logprob(logits)
    assert torch.equal(ids, right_ids)
    torch.testing.assert_close(logprobs, right_logprobs, rtol=1e-6, atol=2e-6)
    out, right = torch.empty_like(logits), torch.empty_like(logits)
    cpp.log_softmax(out, logits)
    reference.log_softmax(right, logits)
    torch.testing.assert_close(out, right, rtol=1e-6, atol=4e-6)
    assert torch.equal(out.gather(1, ids.long()[:, None])[:, 0], logprobs)


def test_the_first_maximum_wins(cpp: CppKernels) -> None:
    logits = _logits(1, 20_000)
    for first in (0, 3, 8191, 8192, 19_999):
        tied = logits.clone()
        tied[0, first:] = torch.where(torch.rand(20_000 - first) < 0.5, 99.0, 0.0)
        tied[0, first] = 99.0
        assert cpp.argmax_logprob(tied)[0].tolist() == [first]


def test_a_row_without_an_answer_says_so(cpp: CppKernels) -> None:
    logits = _logits(5, 9000)
    logits[0, 8999] = math.nan
    logits[1, 0] = math.inf
    logits[2] = -math.inf
    logits[3, 17] = -math.inf
    ids, logprobs = cpp.argmax_logprob(logits)
    out = torch.empty_like(logits)
    cpp.log_softmax(out, logits)
    assert ids[:3].tolist() == [-1, -1, -1]
    assert logprobs[:3].isnan().all()
    assert out[:3].isnan().all()
    assert (ids[3:] >= 0).all()
    assert logprobs[3:].isfinite().all()
    assert out[3, 17] == -math.inf


def test_batch_and_threads_change_no_bit(cpp: CppKernels) -> None:
    logits = _logits(6, 33_000)
    ids, logprobs = cpp.argmax_logprob(logits)
    out = torch.empty_like(logits)
    cpp.log_softmax(out, logits)
    for threads in (1, 2, 3):
        cpp.set_num_threads(threads)
        for row in range(6):
            one_id, one_logprob = cpp.argmax_logprob(logits[row : row + 1])
            one = torch.empty(1, 33_000)
            cpp.log_softmax(one, logits[row : row + 1])
            assert torch.equal(one_id, ids[row : row + 1])
            assert torch.equal(one_logprob, logprobs[row : row + 1])
            assert torch.equal(one[0], out[row])
