"""From logits to tokens: the best one, or one drawn by (seed, choice, position).

Owns the prepared parameters of the sequences it saw last. Invariant: each row is computed on its
own, in a fixed order of operations, so a token and its log-probabilities are bit for bit the same
whatever else is in the batch. Log-probabilities are those of the raw logits.

Order, as in vLLM: edits (logit_edits.py), temperature, min_p, top_k (ties of the k-th are kept),
top_p (ties by lower id). A token is drawn by inverting the sum of the kept probabilities, in
order of token id, in float64; where none is ruled out the kernels do so unless it is a close call
(`Kernels.draw_plain`), with the same result.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.engine.asked import Asked, Draws
from diptych.engine.core.plan import Sample, TokenLogprobs
from diptych.engine.core.request import SeqRef, Sequence
from diptych.engine.logit_edits import LogitEdits
from diptych.engine.logprobs import token_logprobs
from diptych.kernels import DRAW_SPAN, Kernels

__all__ = ["Sampler", "best_samples"]

EDITS_KEPT_MAX: Final = 1024
"""Sequences whose prepared edits are kept; more than one step holds."""
EDITS_KEPT_CALLS: Final = 256
"""Calls of `sample` after which edits that were not used are forgotten: their sequence ended."""
_CHUNK_ELEMENTS: Final = 1 << 16
"""Logits drawn from at a time: their float64 copies stay in the processor's cache."""
_TOP_P_LIKELY: Final = 2.0**-6
"""Weights, relative to the best, that top_p looks at first: often they are enough, and few."""
_TOP_P_SORTED_MAX: Final = 1024
_TOP_P_BIN_SHIFT: Final = 16
"""Bits of an fp32 weight that tell nothing about its bin: 128 bins for each power of two."""

NOT_FINITE: Final = "The model produced logits that are not finite."
NOTHING_ALLOWED: Final = "The sampling parameters allow no token here."


class Sampler:
    """Samples one token per row. Not for two threads at once."""

    def __init__(self, kernels: Kernels, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._edits: OrderedDict[SeqRef, tuple[LogitEdits, int]] = OrderedDict()  # with last call
        self._num_calls = 0
        self._asked: Asked | None = None  # of the newest rows
        self._step = max(1, _CHUNK_ELEMENTS // vocab_size)  # rows drawn together at most
        self._spans = np.arange(0, vocab_size, DRAW_SPAN)  # where each begins

    def takes_best(self, seqs: Seq[Sequence]) -> bool:
        """Whether each of these sequences takes the model's first choice now, and asks for nothing
        else: then `best_samples` is what `sample` gives. seqs: as there."""
        return self._ask(seqs).takes_best

    def _ask(self, seqs: Seq[Sequence]) -> Asked:
        if self._asked is None or self._asked.seqs is not seqs:
            self._asked = Asked(seqs, self._step)
        else:
            self._asked.refresh()
        return self._asked

    def sample(self, logits: Tensor, seqs: Seq[Sequence]) -> list[Sample]:
        """One sample per row of logits ([R, V] fp32, not changed), the next token of seqs[r].

        The same list as in the last call means the same sequences, at most longer ones.
        """
        assert logits.shape == (len(seqs), self._vocab_size)
        self._num_calls += 1
        asked = self._ask(seqs)
        tokens: list[int | str] = [NOT_FINITE] * len(seqs)  # the token, or why there is none
        known: dict[int, float] = {}  # row -> logprob of its token
        if asked.plain:
            ids, logprobs = self._kernels.argmax_logprob(_rows(logits, asked.plain))
            for r, token, logprob in zip(asked.plain, ids.tolist(), logprobs.tolist(), strict=True):
                if token >= 0:
                    tokens[r] = token
                    known[r] = logprob
        if asked.drawn is not None:
            self._draw_plain(logits, asked.drawn, tokens)
        for draws in asked.filtered:
            self._draw(_rows(logits, draws.rows).numpy(), draws, tokens)
        for start in range(0, len(asked.edited), self._step):
            self._draw_edited(logits, seqs, asked.edited[start : start + self._step], tokens)
        entries = self._logprobs(logits, asked.tops, tokens, known) if asked.tops else {}
        return [
            Sample(-1, None, token) if isinstance(token, str) else Sample(token, entries.get(r))
            for r, token in enumerate(tokens)
        ]

    # ---- rows that are not simply greedy -------------------------------------------------------

    def _draw_plain(self, logits: Tensor, draws: Draws, tokens: list[int | str]) -> None:
        """Fill `tokens` of these rows, drawn from all of the vocabulary."""
        drawn = self._kernels.draw_plain(logits, draws.index, draws.temperatures, draws.keys())
        unsure = []
        for i, token in enumerate(drawn):
            if token >= 0:
                tokens[draws.rows[i]] = token
            else:
                unsure.append(i)
        for start in range(0, len(unsure), self._step):
            some = draws.only(unsure[start : start + self._step])
            self._draw(_rows(logits, some.rows).numpy(), some, tokens)

    def _draw_edited(
        self, logits: Tensor, seqs: Seq[Sequence], rows: list[int], tokens: list[int | str]
    ) -> None:
        """Fill `tokens` of these rows, whose logits are edited first."""
        work = logits[rows].numpy()  # [rows, V] fp32, a copy
        finite = np.isfinite(work.max(axis=1))
        random: list[int] = []  # rows of `work`
        for i, r in enumerate(rows):
            if not finite[i]:
                continue
            self._edits_of(seqs[r]).apply(work[i], seqs[r])
            if work[i].max() == -np.inf:
                tokens[r] = NOTHING_ALLOWED
            elif seqs[r].request.params.temperature == 0.0:
                tokens[r] = int(work[i].argmax())
            else:
                random.append(i)
        if random:
            drawn = [rows[i] for i in random]
            self._draw(work[random], Draws(drawn, [seqs[r] for r in drawn]), tokens)

    def _edits_of(self, seq: Sequence) -> LogitEdits:
        """Prepared once per sequence; those of sequences that ended are dropped on the way."""
        known = self._edits.pop(seq.ref, None)
        while self._edits:
            _, last_call = self._edits[next(iter(self._edits))]
            stale = last_call + EDITS_KEPT_CALLS < self._num_calls
            if not stale and len(self._edits) < EDITS_KEPT_MAX:
                break
            self._edits.popitem(last=False)
        edits = LogitEdits(seq, self._vocab_size, self._eos) if known is None else known[0]
        self._edits[seq.ref] = edits, self._num_calls
        return edits

    def _draw(self, work: NDArray[np.float32], draws: Draws, tokens: list[int | str]) -> None:
        """Fill `tokens` of these rows, at temperatures above 0, from their logits ([R, V])."""
        best = work.max(axis=1, keepdims=True)  # [R, 1]
        if not np.isfinite(best).all():
            finite = np.flatnonzero(np.isfinite(best[:, 0])).tolist()
            if finite:
                self._draw(work[finite], draws.only(finite), tokens)
            return
        weights = np.subtract(work, best, dtype=np.float64)  # [R, V]
        with np.errstate(over="ignore"):  # a temperature near 0 leaves the best tokens only
            weights /= draws.temperatures
        np.exp(weights, out=weights)  # 1 at the best token, so no sum is needed for min_p
        for i, p in draws.filtered:
            if p.min_p > 0.0:
                weights[i][weights[i] < p.min_p] = 0.0
            if 0 < p.top_k < work.shape[1]:
                least = np.partition(work[i], work.shape[1] - p.top_k)[work.shape[1] - p.top_k]
                weights[i][work[i] < least] = 0.0
            if p.top_p < 1.0:
                _keep_top_p(weights[i], p.top_p)
        spans = np.add.reduceat(weights, self._spans, axis=1).cumsum(axis=1)
        drawn = self._kernels.draw(weights, spans, draws.keys())
        for r, token in zip(draws.rows, drawn, strict=True):
            tokens[r] = token

    # ---- log-probabilities ---------------------------------------------------------------------

    def _logprobs(
        self,
        logits: Tensor,
        tops: list[tuple[int, int]],
        tokens: list[int | str],
        known: dict[int, float],
    ) -> dict[int, TokenLogprobs]:
        """row -> entry, for the rows that want one; tops: those, with the length of `top`."""
        entries: dict[int, TokenLogprobs] = {}
        wanted: dict[int, list[int]] = {}  # length of `top` -> rows
        for r, top in tops:
            token = tokens[r]
            if isinstance(token, str):
                continue
            if top == 0 and r in known:
                entries[r] = TokenLogprobs(token, known[r], 1, [])  # the best, ties by lower id
            else:
                wanted.setdefault(top, []).append(r)
        for top, rows in wanted.items():
            ids = [token for r in rows if isinstance(token := tokens[r], int)]
            found = token_logprobs(self._kernels, _rows(logits, rows), ids, top)
            entries.update(zip(rows, found, strict=True))
        return entries


def best_samples(tokens: list[int]) -> list[Sample]:
    """Of the ids that `Kernels.argmax_logprob` gives."""
    if min(tokens) >= 0:
        return list(map(Sample, tokens))
    return [Sample(token) if token >= 0 else Sample(-1, None, NOT_FINITE) for token in tokens]


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """These rows of logits ([R, V]), without a copy if they are all."""
    if len(rows) == logits.shape[0]:
        return logits
    return logits[torch.tensor(rows, dtype=torch.int64)]


def _keep_top_p(weights: NDArray[np.float64], top_p: float) -> None:
    """Zero all but the best tokens whose sum first reaches top_p of the whole; weights: [V] up to
    1, ties by lower id.

    Only the tokens around the cut are sorted: the others fall into bins of about equal weight.
    """
    enough = top_p * float(weights.sum())
    likely = np.flatnonzero(weights >= _TOP_P_LIKELY)
    before, low = 0.0, likely  # the sum above the tokens to sort, and those
    if likely.size > _TOP_P_SORTED_MAX or weights[likely].sum() < enough:
        bins = weights.astype(np.float32).view(np.uint32) >> _TOP_P_BIN_SHIFT  # grow with weight
        sums = np.bincount(bins, weights)[::-1].cumsum()  # from the heaviest bin down
        reached = int(np.searchsorted(sums, enough))
        if reached == sums.size:  # only by the rounding of the two sums
            return
        cut = sums.size - 1 - reached
        before = float(sums[reached - 1]) if reached else 0.0
        low = np.flatnonzero(bins == cut)
        weights[bins < cut] = 0.0
    else:
        weights[weights < _TOP_P_LIKELY] = 0.0
    low = low[np.argsort(-weights[low], kind="stable")]
    kept = int(np.searchsorted(before + np.cumsum(weights[low]), enough)) + 1
    weights[low[kept:]] = 0.0
