"""What a request's parameters do to its own logits before a token is chosen from them.

Owns the prepared form of those parameters for one sequence, and its token counts. Invariant: the
edited row is a function of (logits, parameters, tokens) alone; counts are only a faster way to see
the tokens and are made again when they do not belong to them.

The order is vLLM's: allowed ids, bad words, min_tokens, bias, then repetition, frequency and
presence penalties; all in fp32.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diptych.engine.core.params import SamplingParams
from diptych.engine.core.request import Sequence

__all__ = ["LogitEdits", "edits_logits"]

_FORBIDDEN: Final = np.float32(-np.inf)
_FACTOR_MIN: Final = 1e-30
"""Smaller repetition penalties would be 0 in fp32, and 0 * -inf is not a number."""


def edits_logits(seq: Sequence) -> bool:
    """Whether the next token of `seq` is chosen from anything but the model's own logits."""
    params = seq.request.params
    return (
        _penalizes(params)
        or params.logit_bias is not None
        or params.allowed_token_ids is not None
        or bool(params.bad_word_ids)
        or seq.num_emitted < params.min_tokens
    )


def _penalizes(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


class LogitEdits:
    """The edits of one sequence. `apply` is called once for each token it samples."""

    def __init__(self, seq: Sequence, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        params = seq.request.params
        self._vocab_size = vocab_size
        self._params = params
        self._stops = self._ids(eos_token_ids.union(params.stop_token_ids))
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else self._ids(allowed)
        self._bad_words = [
            (word[:-1], word[-1])
            for word in params.bad_word_ids
            if word and 0 <= word[-1] < vocab_size
        ]
        bias = params.logit_bias or {}
        self._bias_ids = self._ids(bias)
        self._bias = np.array(
            [bias[token] for token in self._bias_ids.tolist()], dtype=np.float32
        )  # one per bias id
        self._penalizes = _penalizes(params)
        self._counts = _Counts(seq)

    def _ids(self, tokens: Iterable[int]) -> NDArray[np.int64]:
        known = sorted(token for token in tokens if 0 <= token < self._vocab_size)
        return np.array(known, dtype=np.int64)

    def apply(self, row: NDArray[np.float32], seq: Sequence) -> None:
        """Edits row ([V]), the logits that follow `seq.tokens`, in place."""
        params = self._params
        if self._allowed is not None:
            kept = row[self._allowed]
            row[:] = _FORBIDDEN
            row[self._allowed] = kept
        for prefix, last in self._bad_words:
            if _ends_with(seq, prefix):
                row[last] = _FORBIDDEN
        if seq.num_emitted < params.min_tokens:
            row[self._stops] = _FORBIDDEN
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias
        if self._penalizes:
            self._penalize(row, seq)

    def _penalize(self, row: NDArray[np.float32], seq: Sequence) -> None:
        if not self._counts.follows(seq):
            self._counts = _Counts(seq)
        ids, counts = self._counts.update(seq)
        params = self._params
        values = row[ids]
        if params.repetition_penalty != 1.0:
            factor = np.float32(max(params.repetition_penalty, _FACTOR_MIN))
            with np.errstate(over="ignore"):
                values = np.where(values > 0, values / factor, values * factor)
            values = np.minimum(values, np.finfo(np.float32).max)
        if params.frequency_penalty != 0.0:
            values -= np.float32(params.frequency_penalty) * counts
        if params.presence_penalty != 0.0:
            values -= np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = values


def _ends_with(seq: Sequence, prefix: list[int]) -> bool:
    """Whether the emitted tokens end with `prefix`; prompts are not looked at, as in vLLM."""
    if not prefix:
        return True
    return seq.num_emitted >= len(prefix) and seq.tokens[-len(prefix) :] == prefix


class _Counts:
    """How often each token of a sequence was emitted, with 0 for tokens of the prompt only."""

    def __init__(self, seq: Sequence) -> None:
        self._tokens = seq.tokens
        self._num_seen = 0  # tokens counted so far
        self._index: dict[int, int] = {}
        self._ids = np.zeros(256, dtype=np.int64)
        self._counts = np.zeros(256, dtype=np.float32)

    def follows(self, seq: Sequence) -> bool:
        return self._tokens is seq.tokens and self._num_seen <= len(seq.tokens)

    def update(self, seq: Sequence) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct tokens in order of first appearance, and how often each was emitted."""
        index, first_emitted = self._index, seq.num_prompt
        for place in range(self._num_seen, len(seq.tokens)):
            token = seq.tokens[place]
            where = index.get(token)
            if where is None:
                where = index[token] = len(index)
                self._reserve(where)
                self._ids[where] = token
            if place >= first_emitted:
                self._counts[where] += 1
        self._num_seen = len(seq.tokens)
        return self._ids[: len(index)], self._counts[: len(index)]

    def _reserve(self, where: int) -> None:
        if where == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
