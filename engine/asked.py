"""What the sequences of a batch ask of the sampler, looked up once and kept from step to step.

Owns nothing of the sequences. Invariant: it stays true while they only get longer: all that changes
with their length is looked at again in `refresh`.
"""

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from diptych.engine.core.params import SamplingParams
from diptych.engine.core.request import Sequence
from diptych.engine.logit_edits import edits_logits

__all__ = ["Asked", "Draws"]


class Asked:
    """Of some sequences, by what is done with their rows of logits."""

    __slots__ = (
        "_step",
        "_unreached",
        "drawn",
        "edited",
        "filtered",
        "plain",
        "seqs",
        "takes_best",
        "tops",
    )

    def __init__(self, seqs: Seq[Sequence], step: int) -> None:
        """step: rows that are filtered together at most."""
        self.seqs = seqs
        self._step = step
        self.tops = [  # (row, length of `top`) where log-probabilities are wanted
            (r, top)
            for r, seq in enumerate(seqs)
            if (top := seq.request.params.logprobs) is not None
        ]
        self._look()

    def _look(self) -> None:
        self.plain: list[int] = []  # rows: the model's first choice
        self.edited: list[int] = []  # rows: their logits are edited first
        drawn: list[int] = []  # rows: from all tokens, at a temperature
        filtered: list[int] = []  # rows: from some
        for r, seq in enumerate(self.seqs):
            if edits_logits(seq):
                self.edited.append(r)
            elif seq.request.params.temperature == 0.0:
                self.plain.append(r)
            elif _filters(seq.request.params):
                filtered.append(r)
            else:
                drawn.append(r)
        self.drawn = Draws(drawn, [self.seqs[r] for r in drawn]) if drawn else None
        self.filtered = [
            Draws(rows := filtered[start : start + self._step], [self.seqs[r] for r in rows])
            for start in range(0, len(filtered), self._step)
        ]
        self._unreached = [seq for seq in self.seqs if not _reached(seq)]
        self.takes_best = len(self.plain) == len(self.seqs) and not self.tops

    def refresh(self) -> None:
        """The sequences may have grown."""
        if self._unreached and any(map(_reached, self._unreached)):
            self._look()


class Draws:
    """Rows that are drawn together."""

    __slots__ = ("_keys", "_seqs", "_starts", "filtered", "index", "rows", "temperatures")

    def __init__(self, rows: list[int], seqs: list[Sequence]) -> None:
        """seqs: one for each of the rows."""
        params = [seq.request.params for seq in seqs]
        self.rows = rows
        self.index = np.array(rows, dtype=np.int32)
        self._seqs = seqs
        self._starts = [seq.num_prompt for seq in seqs]
        self.temperatures = np.array([[p.temperature] for p in params], dtype=np.float64)  # [R, 1]
        self.filtered = [  # of these rows, with parameters of which tokens are possible at all
            (i, p) for i, p in enumerate(params) if _filters(p)
        ]
        self._keys = np.zeros((len(rows), 3), dtype=np.uint64)
        self._keys[:, 0] = [_seed(seq) % 2**64 for seq in seqs]
        self._keys[:, 1] = [seq.ref.choice for seq in seqs]

    def keys(self) -> NDArray[np.uint64]:
        """Of the sequences' next tokens, as in `Kernels.draw`; valid until the next call."""
        self._keys[:, 2] = [
            len(seq.tokens) - start for seq, start in zip(self._seqs, self._starts, strict=True)
        ]
        return self._keys

    def only(self, picked: list[int]) -> "Draws":
        """Some of these, by their places."""
        return Draws([self.rows[i] for i in picked], [self._seqs[i] for i in picked])


def _filters(params: SamplingParams) -> bool:
    """Whether some tokens are ruled out by their weights."""
    return params.min_p > 0.0 or params.top_k > 0 or params.top_p < 1.0


def _reached(seq: Sequence) -> bool:
    """Whether `min_tokens` edits nothing any more."""
    return seq.num_emitted >= seq.request.params.min_tokens


def _seed(seq: Sequence) -> int:
    seed = seq.request.params.seed
    assert seed is not None, "the front door sets a seed for every request"
    return seed
