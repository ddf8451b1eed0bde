"""Prompts that wait on a worker which prefills no more: which are better off elsewhere. Pure.

Owns nothing: a choice is arithmetic on costs. A decode worker computes a block of its prompts in a
step of its decodes, so that what was queued there would crawl. Invariants: a row moves only where
it is expected to be computed sooner, whatever was computed of it already; never more often than
`MOVES_MAX` times.
"""

from dataclasses import dataclass
from typing import Final

from diptych.engine.core.config import CacheOptions
from diptych.engine.core.types import HASH_UNIT_TOKENS, Role
from diptych.scheduler.lifecycle import RowState
from diptych.scheduler.members import Worker
from diptych.scheduler.rows import Row

MOVES_MAX: Final = 2
MOVE_S: Final = 0.02
"""Until a row that is taken back is placed again: the end of a step, and three messages."""


@dataclass(slots=True, frozen=True)
class Prompt:
    """A row of a worker that is still to be computed there."""

    row: Row
    left_tokens: int


def prompts_on(worker: Worker, block_size: int) -> list[Prompt]:
    """Those that are known to be unfinished, in the order in which they are computed."""
    found = []
    for row in sorted(worker.assigned.values(), key=lambda row: row.order):
        if row.state is not RowState.RUNNING or row.holds[worker.id] is Role.DECODE or row.alone:
            continue
        source = row.source
        if source is not None and row.holds[worker.id] is Role.LOCAL:
            continue  # the tail of a prompt whose head comes from elsewhere
        done = row.num_committed if source is None else source.num_committed
        if done < row.num_tokens // block_size:
            found.append(Prompt(row, row.num_tokens - done * block_size))
    return found


def decodes_on(worker: Worker, row: Row, block_size: int) -> bool:
    """Its prompt is computed, as far as is known, and it has the worker's steps."""
    if row.holds[worker.id] is not Role.LOCAL:
        return row.holds[worker.id] is Role.DECODE and Role.PREFILL not in row.holds.values()
    return row.source is None and row.num_committed >= row.num_tokens // block_size


def better_elsewhere(worker: Worker, others: list[Worker], cache: CacheOptions) -> list[Row]:
    """`others`: who else may be given prompts."""
    prompts = prompts_on(worker, cache.block_size)
    decodes = any(decodes_on(worker, row, cache.block_size) for row in worker.assigned.values())
    ends_s = {w: w.backlog_tokens * _token_s(w) for w in others if w.dial > 0}
    here_s, moved = 0.0, []
    for prompt in prompts:
        stay_s = here_s + _crawl_s(worker, prompt.left_tokens, decodes)
        there_s, there = min(
            ((end_s + _compute_s(prompt, worker, w, cache), w.id) for w, end_s in ends_s.items()),
            default=(stay_s, -1),
        )
        if prompt.row.moves >= MOVES_MAX or there_s + MOVE_S >= stay_s:
            here_s = stay_s
            decodes = decodes or prompt.row.holds[worker.id] is Role.LOCAL
            continue
        ends_s |= {w: there_s for w in ends_s if w.id == there}
        moved.append(prompt.row)
    return moved


def _crawl_s(worker: Worker, tokens: int, decodes: bool) -> float:
    """Until a decode worker has computed them, alone or beside decodes."""
    beside_s = tokens / HASH_UNIT_TOKENS * worker.cost.step_s if decodes else 0.0
    return tokens * worker.cost.prefill_s + beside_s


def _compute_s(prompt: Prompt, here: Worker, there: Worker, cache: CacheOptions) -> float:
    """What is full already is found again in the same pool, if anything is."""
    found = cache.enable_prefix_caching and there.pool == here.pool
    tokens = prompt.left_tokens if found else prompt.row.num_tokens
    return tokens * _token_s(there)


def _token_s(worker: Worker) -> float:
    return worker.cost.prefill_s * 100.0 / worker.dial
