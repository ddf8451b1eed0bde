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


_ROW_BOUNDS: Final = (1e-9, 1.0)  # seconds per decode of a step
_GUESS_ROWS: Final = 4.0  # squared decodes of spread that a guess of the slope is worth


class StepLine:
    """How long a step without prefill is, by its number of decodes: a line through the mean of the
    reports, with their slope as far as their numbers of decodes differ."""

    def __init__(self) -> None:
        self.mean_rows = 0.0
        self._mean_s = 0.0
        self._spread = 0.0  # variance of the number of decodes
        self._joint_s = 0.0  # its covariance with the step

    def observe(self, rows: float, step_s: float) -> None:
        if not self.mean_rows:
            self.mean_rows, self._mean_s = rows, step_s
            return
        off, off_s = rows - self.mean_rows, step_s - self._mean_s
        self.mean_rows += _WEIGHT * off
        self._mean_s += _WEIGHT * off_s
        self._spread = (1.0 - _WEIGHT) * (self._spread + _WEIGHT * off * off)
        self._joint_s = (1.0 - _WEIGHT) * (self._joint_s + _WEIGHT * off * off_s)

    def copy(self) -> "StepLine":
        line = StepLine()
        line.mean_rows, line._mean_s = self.mean_rows, self._mean_s
        line._spread, line._joint_s = self._spread, self._joint_s
        return line

    def of(self, step_s: float, token_s: float) -> tuple[float, float]:
        """(constant, per decode) for a mean step of `step_s`. Where nothing tells, a decode is
        taken to add what a token of a prompt costs, `token_s`, but half of the step at most."""
        rows = max(1.0, self.mean_rows)
        guess_s = min(token_s, 0.5 * step_s / rows)
        slope_s = (self._joint_s + _GUESS_ROWS * guess_s) / (self._spread + _GUESS_ROWS)
        slope_s = _bounded(min(slope_s, 0.9 * step_s / rows), _ROW_BOUNDS)
        return max(step_s - slope_s * rows, _STEP_BOUNDS[0]), slope_s


class WorkerCost:
    """Exponentially weighted estimates; the first report of each kind replaces the guess."""

    def __init__(self, prefill_s: float = 1e-4, step_s: float = 5e-3) -> None:
        self.prefill_s = prefill_s  # per token
        self.step_s = step_s  # per step without prefill
        self._line = StepLine()
        self._has_prefill = self._has_step = False  # seen alone
        self._knows_prefill = self._knows_step = False  # or taken from somewhere

    @property
    def known(self) -> tuple[bool, bool]:
        """Whether (prefill, a step without it) was seen; what was not is a guess."""
        return self._has_prefill, self._has_step

    @property
    def row_s(self) -> float:
        """What each decode adds to a step."""
        return self._line.of(self.step_s, self.prefill_s)[1]

    @property
    def base_s(self) -> float:
        """A step without prefill, but for its decodes."""
        return self._line.of(self.step_s, self.prefill_s)[0]

    def guess_like(self, other: "WorkerCost") -> None:
        """What this worker has not shown yet is taken for what another one has: a worker that looks
        dear only because nobody has tried it would never be tried."""
        if other._has_prefill and not self._has_prefill:
            self.prefill_s, self._knows_prefill = other.prefill_s, True
        if other._has_step and not self._has_step:
            self.step_s, self._knows_step = other.step_s, True
            self._line = other._line.copy()

    def observe(
        self, steps: int, compute_s: float, prefill_tokens: int, decode_tokens: int
    ) -> None:
        """One report: `steps` took `compute_s` and computed these tokens of prompts and answers."""
        if steps <= 0 or not 0.0 < compute_s < 1e6:
            return
        if prefill_tokens <= 0:
            step_s = _bounded(compute_s / steps, _STEP_BOUNDS)
            self.step_s += (step_s - self.step_s) * (_WEIGHT if self._has_step else 1.0)
            self._has_step = self._knows_step = True
            if decode_tokens > 0:
                self._line.observe(decode_tokens / steps, step_s)
        elif decode_tokens > 0 and self._knows_step and self._knows_prefill:
            self._correct(steps, compute_s, prefill_tokens, decode_tokens)
        elif decode_tokens > 0 and self._knows_prefill:  # the rest is what a step costs, at a guess
            rest_s = max(compute_s - prefill_tokens * self.prefill_s, 0.5 * compute_s)
            self.step_s, self._knows_step = _bounded(rest_s / steps, _STEP_BOUNDS), True
        else:
            decode_s = 0.0
            if decode_tokens > 0 and self._knows_step:
                decode_s = min(steps * self.step_s, 0.5 * compute_s)
            prefill_s = _bounded((compute_s - decode_s) / prefill_tokens, _PREFILL_BOUNDS)
            self.prefill_s += (prefill_s - self.prefill_s) * (_WEIGHT if self._has_prefill else 1.0)
            self._has_prefill = self._knows_prefill = True

    def _correct(
        self, steps: int, compute_s: float, prefill_tokens: int, decode_tokens: int
    ) -> None:
        """A report with both, which are known: each is corrected as far as it made up the report,
        so that steps with little prefill say little about prefill."""
        base_s, row_s = self._line.of(self.step_s, self.prefill_s)
        decode_s = steps * base_s + decode_tokens * row_s
        prefill_s = prefill_tokens * self.prefill_s
        known_s = decode_s + prefill_s
        error = (min(compute_s / known_s, 4.0) - 1.0) * _WEIGHT
        error *= known_s / (decode_s * decode_s + prefill_s * prefill_s)
        self.step_s = _bounded(self.step_s * (1.0 + error * decode_s), _STEP_BOUNDS)
        self.prefill_s = _bounded(self.prefill_s * (1.0 + error * prefill_s), _PREFILL_BOUNDS)


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
