"""What work costs on one worker, and moving a block between two pools, fitted while they run.

Owns two numbers per worker (seconds per prefill token, seconds of a step without prefill) and one
per pair of pools (seconds per block moved). Invariant: all stay inside fixed bounds, whatever a
report says, so that one absurd report (a suspended laptop) can mislead placement for a few reports,
never for good.
"""

from typing import Final

_WEIGHT: Final = 0.125  # of the newest report
_PREFILL_BOUNDS: Final = (1e-8, 0.1)  # seconds per token
_STEP_BOUNDS: Final = (1e-5, 5.0)  # seconds per step
_BLOCK_BOUNDS: Final = (1e-7, 1.0)  # seconds per block moved


class WorkerCost:
    """Exponentially weighted estimates; the first report of each kind replaces the guess."""

    def __init__(self, prefill_s: float = 1e-4, step_s: float = 5e-3) -> None:
        self.prefill_s = prefill_s  # per token
        self.step_s = step_s  # per step without prefill
        self._has_prefill = False
        self._has_step = False

    @property
    def known(self) -> tuple[bool, bool]:
        """Whether (prefill, a step without it) was seen; what was not is a guess."""
        return self._has_prefill, self._has_step

    def guess_like(self, other: "WorkerCost") -> None:
        """What this worker has not shown yet is taken for what another one has: a worker that looks
        dear only because nobody has tried it would never be tried."""
        if other._has_prefill and not self._has_prefill:
            self.prefill_s = other.prefill_s
        if other._has_step and not self._has_step:
            self.step_s = other.step_s

    def observe(
        self, steps: int, compute_s: float, prefill_tokens: int, decode_tokens: int
    ) -> None:
        """One report: `steps` took `compute_s` and computed these tokens of prompts and answers.

        A report with both scales both costs alike once each was seen alone; before that its
        prefill is charged with all but what its decodes are known to cost.
        """
        if steps <= 0 or not 0.0 < compute_s < 1e6:
            return
        if prefill_tokens <= 0:
            step_s = _bounded(compute_s / steps, _STEP_BOUNDS)
            self.step_s += (step_s - self.step_s) * (_WEIGHT if self._has_step else 1.0)
            self._has_step = True
            return
        if decode_tokens > 0 and self._has_step and self._has_prefill:
            known_s = steps * self.step_s + prefill_tokens * self.prefill_s
            scale = 1.0 + (min(compute_s / known_s, 4.0) - 1.0) * _WEIGHT
            self.step_s = _bounded(self.step_s * scale, _STEP_BOUNDS)
            self.prefill_s = _bounded(self.prefill_s * scale, _PREFILL_BOUNDS)
            return
        decode_s = 0.0
        if decode_tokens > 0 and self._has_step:
            decode_s = min(steps * self.step_s, 0.5 * compute_s)
        prefill_s = _bounded((compute_s - decode_s) / prefill_tokens, _PREFILL_BOUNDS)
        self.prefill_s += (prefill_s - self.prefill_s) * (_WEIGHT if self._has_prefill else 1.0)
        self._has_prefill = True


_BLOCK_GUESS_S: Final = 1e-4
_RELAX: Final = 1.0 / 16.0


class PairCost:
    """Exponentially weighted estimate of one direction between two pools."""

    def __init__(self) -> None:
        self.block_s = _BLOCK_GUESS_S
        self.num_blocks = 0  # moved since start
        self._known = False

    def observe(self, num_blocks: int, read_s: float) -> None:
        """`num_blocks` moved while reads were under way for `read_s`."""
        if num_blocks <= 0 or not 0.0 <= read_s < 1e6:
            return
        self.num_blocks += num_blocks
        block_s = _bounded(read_s / num_blocks, _BLOCK_BOUNDS)
        self.block_s += (block_s - self.block_s) * (_WEIGHT if self._known else 1.0)
        self._known = True

    def relax(self) -> None:
        """The pair was passed over: what made it dear may be over, and only trying would tell."""
        if self.block_s > _BLOCK_GUESS_S:
            self.block_s += (_BLOCK_GUESS_S - self.block_s) * _RELAX

    def exposed_s(self, num_blocks: int, compute_s: float) -> float:
        """What moving the blocks adds to a prefill of `compute_s`, which it overlaps: all that the
        computation does not hide, and at least the last block."""
        return max(num_blocks * self.block_s - compute_s, self.block_s)


def _bounded(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
