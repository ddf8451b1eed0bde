"""What runs in one step of one worker: all decodes, then prompt chunks within the budget.

Owns the turns of decodes and prompts where a step has room for one row only. Invariant: a plan is
within the options' limits, and a sequence stands in it once.
"""

from typing import Final

from diptych.engine.core.config import BatchOptions
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.core.request import SeqRef
from diptych.scheduler.knee import Knee
from diptych.scheduler.lineup import Lineup
from diptych.scheduler.pace import Pace
from diptych.scheduler.running import Running

TAPERED_TOKENS_MIN: Final = 128
"""Of a chunk that is short only so that the next one is: a shorter one costs more than it hides."""


def chunk_length(start: int, end: int, most: int, block_size: int, pulled: bool) -> int:
    """Tokens of the next chunk of a prompt, of which [start, end) is to be computed.

    `pulled`: another pool reads each chunk's blocks while the next ones are computed. Nothing hides
    the reading of the last one, so the chunks get shorter towards the end: none is more than half
    of what is left.
    """
    length = rest = end - start
    if pulled and rest >= 2 * TAPERED_TOKENS_MIN:
        length = rest // 2
    length = min(length, most)
    if length < rest:
        # A chunk that does not finish its prompt ends with a block where it can: the block is
        # committed at once.
        length = max(length - (start + length) % block_size, 0) or length
    return length


class StepPlanner:
    def __init__(self, lineup: Lineup, options: BatchOptions, block_size: int) -> None:
        self._lineup = lineup
        self._options = options
        self._block_size = block_size
        self._pace = Pace(options.itl_slo_s)
        self._knee = Knee()
        self._odd = 0  # parity of the steps that ran

    def stepped(self, plan: StepPlan, compute_s: float) -> None:
        """A planned step is over."""
        self._odd = 1 - self._odd
        self._knee.observe(plan.num_tokens, compute_s)
        self._pace.observe(compute_s, plan.num_tokens - plan.num_decodes, plan.num_decodes)

    def plan(self, dial: int, starved: list[SeqRef]) -> tuple[StepPlan, list[Running]]:
        """The step and its rows' sequences; adds to `starved` those that lack a block."""
        lineup, options = self._lineup, self._options
        starved += [run.ref for run in lineup.settle()]
        budget, seats, reserve = options.max_num_batched_tokens, options.max_num_seqs, 0
        if lineup.prefills:
            # Waiting prompts always get a block's worth of the budget and one row of the step;
            # where a step has room for one only, they and the decodes take turns.
            reserve = min(self._block_size, budget // 2) or self._odd
            seats = seats - 1 or 1 - self._odd
        decodes = lineup.next_decodes(min(budget - reserve, seats))
        rows = [StepRow(seq := run.seq, seq.num_computed, 1, True) for run in decodes]
        num_decodes = num_tokens = len(rows)
        runs = decodes.copy()
        if lineup.prefills:
            left = budget - num_decodes
            if num_decodes:
                left = min(left, max(reserve, self._share(left, dial)))
            num_tokens += self._plan_prefills(rows, runs, left, starved)
        return StepPlan(rows, num_tokens, num_decodes), runs

    def _share(self, tokens: int, dial: int) -> int:
        """What prefill may have of the budget beside decodes."""
        share, most = tokens * dial // 100, self._pace.prefill_tokens_max()
        return share if most is None else min(share, most)

    def _plan_prefills(
        self, rows: list[StepRow], runs: list[Running], budget: int, starved: list[SeqRef]
    ) -> int:
        """Append chunks of the waiting prompts, in their order, while another one costs the step
        less than it waits; returns the tokens planned."""
        options, block_size, left = self._options, self._block_size, budget
        enough = options.prefill_batch_tokens or self._knee.tokens()
        for run in self._lineup.prefills.copy():
            if left <= 0 or budget - left >= enough or len(rows) >= options.max_num_seqs:
                break
            start, end = run.seq.num_computed, run.prefill_end
            room = run.room(block_size)
            if room <= 0:
                self._lineup.starve(run)
                starved.append(run.ref)
                continue
            most = min(left, room, options.max_chunk_tokens or left)
            length = chunk_length(start, end, most, block_size, run.handoff is not None)
            rows.append(StepRow(run.seq, start, length, start + length == len(run.tokens)))
            runs.append(run)
            run.plan_chunk(start + length, block_size)
            left -= length
        return budget - left
