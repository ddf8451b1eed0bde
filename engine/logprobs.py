"""Log-probabilities of chosen tokens, with the best alternatives and the rank.

Owns the order: better logprob first, equal ones by lower token id, for `top` and `rank` alike.
Invariant: a row's entry depends on nothing but that row's logits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.engine.core.plan import TokenLogprobs
from diptych.kernels import Kernels

__all__ = ["token_logprobs"]


def token_logprobs(
    kernels: Kernels, logits: Tensor, chosen: Sequence[int], top_k: int
) -> list[TokenLogprobs]:
    """One entry per row of logits ([R, V] fp32, not changed) for the token `chosen[r]`.

    top_k: length of `top`, 0 for none. A row with a NaN or without a finite maximum gives a NaN
    logprob, rank 1 and no `top`.
    """
    assert len(chosen) == logits.shape[0]
    logprobs = torch.empty_like(logits)  # [R, V]
    kernels.log_softmax(logprobs, logits)
    top_k = min(top_k, logits.shape[1])
    worst: list[float] = []  # logprob of the last entry of each row's `top`
    if top_k:
        worst = torch.topk(logprobs, top_k, dim=1).values[:, -1].tolist()
    entries: list[TokenLogprobs] = []
    for r, token in enumerate(chosen):
        row = logprobs[r]  # [V]
        logprob = float(row[token])
        if math.isnan(logprob):
            entries.append(TokenLogprobs(token, math.nan, 1, []))
            continue
        better = int((row > logprob).sum()) + int((row[:token] == logprob).sum())
        top = _top(row, worst[r], top_k) if top_k else []
        entries.append(TokenLogprobs(token, logprob, 1 + better, top))
    return entries


def _top(row: Tensor, worst: float, top_k: int) -> list[tuple[int, float]]:
    """The best `top_k` of row [V], given the logprob of the last; torch.topk breaks ties freely."""
    ids = (row >= worst).nonzero()[:, 0]  # ascending, at least top_k
    values = row[ids]
    order = torch.sort(values, descending=True, stable=True).indices[:top_k]
    return list(zip(ids[order].tolist(), values[order].tolist(), strict=True))
