"""One step of one worker as data: what to run, and what came out.

A `StepPlan` refers to live `Sequence`s and stays in its process. Order is a contract: rows stand in
the plan with all decodes first, then the prefill chunks, and every list of a result follows it.
`StepRow` and `Sample` are structs, not dataclasses: one of each is made per row and step (0.05 us
against 0.5 us).
"""

from dataclasses import dataclass, field

import msgspec

from diptych.engine.core.request import Sequence
from diptych.engine.core.types import FinishReason


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural) at one position under the model's raw distribution.

    `top` is sorted best first, ties by lower id: (token id, logprob); `rank` of the chosen token
    counts from 1.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class StepRow(msgspec.Struct, frozen=True, gc=False):
    """Compute the tokens [start, start + length) of `seq`; then sample one token if `sample`."""

    seq: Sequence
    start: int
    length: int
    sample: bool


@dataclass(slots=True, frozen=True)
class StepPlan:
    rows: list[StepRow]
    num_tokens: int  # sum of row lengths
    num_decodes: int  # the first rows, each of length 1, behind the prompt, and sampled

    @property
    def empty(self) -> bool:
        return not self.rows


class Sample(msgspec.Struct, frozen=True, gc=False):
    """What one row sampled. `error` set: the row cannot go on (say, NaN logits), others can."""

    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(slots=True)
class StepResult:
    """`samples[i]` belongs to `rows[i]`, None where the row did not sample.

    `prompt_logprobs[i]`: entries for the prompt positions start+1 .. start+length of the row
    (what the row's logits say about the next prompt token), only for sequences that want them.
    """

    samples: list[Sample | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    compute_s: float = 0.0


class FinishInfo(msgspec.Struct, frozen=True, array_like=True):
    """Why a choice ended; `stop_reason` is the stop token id or stop string, None for EOS."""

    reason: FinishReason
    stop_reason: int | str | None = None
    message: str | None = None
