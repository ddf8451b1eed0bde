"""Bugs in the API server's log."""

from contextlib import ExitStack

from diptych.engine.core.messages import ChoiceState
from diptych.scheduler.journal import Journal
from diptych.scheduler.log_row import ChoiceRow
from tests.sim.mutants.registry import edit, mutant, replace


@mutant("worker_crash", "clog")
def old_attempt_taken(stack: ExitStack) -> None:
    """Tokens of an attempt that was given up reach the client."""
    edit(stack, Journal, "_current", "choice.done or choice.attempt != ref.attempt", "choice.done")


@mutant("token_loss")
def gap_ignored(stack: ExitStack) -> None:
    """Tokens after a gap are taken as if nothing was missing."""
    edit(stack, Journal, "_tokens", "item.first_index > len(choice.emitted)", "False")
    edit(
        stack,
        ChoiceRow,
        "accept",
        'assert skip >= 0, "a gap is no part of the log"',
        "skip = max(0, skip)",
    )


@mutant()
def overlap_delivered(stack: ExitStack) -> None:
    """Token 0 reaches the client from both workers."""
    edit(stack, ChoiceRow, "accept", "skip = first - item.first_index", "skip = 0")


@mutant("scheduler_crash", "clog", "small_caps", "burst")
def old_epoch_taken(stack: ExitStack) -> None:
    """The journal listens to a scheduler that is gone."""
    edit(stack, Journal, "handle", "message.scheduler_epoch != self._epoch", "False")


@mutant("worker_crash")
def emitted_lost(stack: ExitStack) -> None:
    """A new attempt starts from the prompt, as if nothing had been emitted."""

    def state(self: ChoiceRow, request: object, block_size: int) -> ChoiceState:
        found = original(self, request, block_size)  # type: ignore[arg-type]
        return ChoiceState(
            found.choice, found.attempt, b"", found.hashes, found.want_prompt_logprobs
        )

    original = ChoiceRow.state
    replace(stack, ChoiceRow, "state", state)


@mutant("worker_crash")
def loss_not_answered(stack: ExitStack) -> None:
    """A lost attempt is not submitted again."""
    replace(stack, Journal, "_again", lambda self, ref: None)


@mutant("scheduler_crash")
def restart_not_answered(stack: ExitStack) -> None:
    """A new scheduler hears of new requests only."""
    edit(stack, Journal, "_scheduler_up", "OrderedDict.fromkeys(self._rows)", "OrderedDict()")


@mutant("deadline")
def deadline_ignored(stack: ExitStack) -> None:
    """A request lives past its deadline."""
    edit(stack, Journal, "tick", "row.deadline is not None and row.deadline <= now", "False")


@mutant()
def closed_not_said(stack: ExitStack) -> None:
    """The scheduler never hears that a request is over."""
    edit(stack, Journal, "_forget", "if self._known(row):", "if False:")


@mutant("stop", "choices")
def stop_not_said(stack: ExitStack) -> None:
    """A choice that was stopped at a string goes on computing."""
    edit(stack, Journal, "stop", "if self._known(row):", "if False:")


@mutant("small_caps", "burst")
def open_without_cap(stack: ExitStack) -> None:
    """The log of one API server has no limit."""
    edit(stack, Journal, "open", "len(self._rows) >= self._max_open", "False")
