"""Which hidden states of a step go through the output head, in which portions.

Owns the order: samples first, then prompt logprobs, row by row. Invariant: it follows from the plan
alone, so it is known before the step runs and every rank of a worker makes the same calls.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.engine.core.plan import StepRow

__all__ = ["HeadCall", "head_calls", "outputs"]


@dataclass(slots=True, frozen=True, eq=False)
class HeadCall:
    """`prompt` None: a sample for each row of the plan in `rows`."""

    hidden: Tensor  # [R] int32, rows of the step's hidden states
    rows: list[int]
    prompt: tuple[int, int] | None = None  # of `rows[0]`: what follows tokens [start, stop)


def head_calls(rows: list[StepRow], portion: int) -> list[HeadCall]:
    """At most `portion` hidden states in each."""
    sampled: list[int] = []  # indices of rows
    last: list[int] = []  # their last token's hidden state
    prompts: list[HeadCall] = []
    end = 0
    for index, row in enumerate(rows):
        begin, end = end, end + row.length
        if row.sample:
            sampled.append(index)
            last.append(end - 1)
        if row.seq.want_prompt_logprobs:
            # The logits of the token before the prompt's last one say the last one.
            until = min(row.start + row.length, row.seq.num_prompt - 1)
            for start in range(row.start, until, portion):
                stop = min(start + portion, until)
                at = torch.arange(
                    begin + start - row.start, begin + stop - row.start, dtype=torch.int32
                )
                prompts.append(HeadCall(at, [index], (start, stop)))
    samples = [
        HeadCall(
            torch.tensor(last[start : start + portion], dtype=torch.int32),
            sampled[start : start + portion],
        )
        for start in range(0, len(sampled), portion)
    ]
    return samples + prompts


def outputs(calls: list[HeadCall]) -> Tensor | None:
    """The rows of the plan ([n] int32, ascending) whose last hidden state is all that is asked for;
    None: prompts ask for more."""
    if any(call.prompt is not None for call in calls):
        return None
    return torch.tensor([row for call in calls for row in call.rows], dtype=torch.int32)
