"""Bugs in the scheduler's decisions: admission, queue, preemption, loss."""

from contextlib import ExitStack

from diptych.engine.core.messages import Grant
from diptych.scheduler.intake import Intake
from diptych.scheduler.members import Members, Worker
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.placement import Placer
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.runs import Runs
from diptych.scheduler.scheduler import Scheduler
from diptych.scheduler.seating import Seating
from tests.sim.mutants.registry import edit, mutant, replace


@mutant("worker_crash")
def peer_not_revoked(stack: ExitStack) -> None:
    """The decode side is not told when its prefill side dies."""
    edit(stack, Runs, "lose", "self.take_back(row, but=worker)", "self._stop(row)")


@mutant("worker_crash", "burst", "crash_loop", "clog")
def sealed_row_forgotten(stack: ExitStack) -> None:
    """A worker's death loses no row that it has sealed, though the seal may be lost."""
    edit(stack, Scheduler, "_on_worker_down", "worker.sealed.values()", "()")


@mutant("worker_crash", "clog")
def finished_row_forgotten(stack: ExitStack) -> None:
    """A worker's death loses no row that it has finished, though its last tokens may be lost."""
    edit(stack, Scheduler, "_on_worker_down", "worker.finished.values()", "()")


@mutant("worker_crash")
def loss_not_told(stack: ExitStack) -> None:
    """The API server does not hear of a loss."""
    replace(stack, Intake, "_tell_lost", lambda self, row: None)


@mutant("tiny_pool", "burst", "priority")
def preempted_for_ever(stack: ExitStack) -> None:
    """A row that was preempted often enough is preempted again."""
    edit(stack, Runs, "_preempt", "victim.preemptions += 1", "pass")


@mutant("tiny_pool")
def starved_row_ignored(stack: ExitStack) -> None:
    """A row that asks for blocks when there are none gets none later."""
    replace(stack, Runs, "_feed", lambda self, pool: None)


@mutant()
def granted_twice(stack: ExitStack) -> None:
    """A grant is sent two times."""

    def grant(self: Outbox, worker: Worker, granted: Grant) -> None:
        original(self, worker, granted)
        original(self, worker, granted)

    original = Outbox.grant
    replace(stack, Outbox, "grant", grant)


@mutant("disconnect")
def closed_row_stays(stack: ExitStack) -> None:
    """A request that was closed while it ran is never removed."""
    edit(stack, Intake, "drained", "self._remove(row)", "pass")


@mutant("stop", "disconnect")
def abort_leaks(stack: ExitStack) -> None:
    """Blocks of an aborted row are not given back."""
    edit(stack, Intake, "_end", "if before is RowState.RUNNING:", "if False:")


@mutant("stop", "choices")
def abort_ignored(stack: ExitStack) -> None:
    """A choice that its client needs no more goes on."""
    replace(stack, Intake, "abort", lambda self, message: None)


@mutant()
def submit_not_answered(stack: ExitStack) -> None:
    """A request is taken without a word."""
    edit(stack, Intake, "submit", "self._outbox.accept(api, request.id)", "pass")


@mutant("small_caps", "burst")
def admission_leaks(stack: ExitStack) -> None:
    """Tokens that waited count for ever."""
    edit(stack, WaitingRoom, "leave", "self.num_tokens -= row.tokens_wanted()", "pass")


@mutant("small_caps", "burst")
def queue_without_cap(stack: ExitStack) -> None:
    """Any number of rows may wait."""
    replace(stack, WaitingRoom, "has_room", lambda self, num_rows, num_tokens: True)


@mutant("small_caps", "burst", "worker_crash", "scheduler_crash")
def accepted_then_rejected(stack: ExitStack) -> None:
    """A request that comes back after a restart is measured against the caps."""
    edit(stack, Intake, "_admits", "if message.recovering:", "if False:")


@mutant("small_caps", "burst")
def seats_without_cap(stack: ExitStack) -> None:
    """A worker gets more sequences than it may hold."""
    edit(stack, Placer, "_has_seat", "and len(worker.assigned) < self._sequences_max", "")


@mutant("prefix", "burst")
def waiters_never_woken(stack: ExitStack) -> None:
    """A row that waits for another's blocks waits for ever."""
    edit(stack, Runs, "_computed", "if waiters is not None:", "if False:")


@mutant("poison")
def suspects_share_a_worker(stack: ExitStack) -> None:
    """Innocent neighbours of a poison request are blamed with it."""
    edit(stack, Scheduler, "_on_worker_down", "row.poison or row.alone", "True")


@mutant("poison")
def poison_never_fails(stack: ExitStack) -> None:
    """A request that crashes every worker is tried for ever."""
    edit(stack, Scheduler, "_on_worker_down", "row.poison = row.poison or row.alone", "pass")


@mutant("api_crash")
def dead_api_keeps_rows(stack: ExitStack) -> None:
    """The requests of a dead API server go on."""
    replace(stack, Intake, "api_down", lambda self, api: None)


@mutant()
def room_not_noticed(stack: ExitStack) -> None:
    """Nobody looks at the queue again when room comes free."""
    edit(stack, Runs, "let_go", "self.room_version += 1", "pass")


@mutant("far", "refusal")
def refusals_forgotten(stack: ExitStack) -> None:
    """Two pools that do not go together are tried again and again."""
    replace(stack, Members, "refuse", lambda self, reader, refused: False)


@mutant("far", "refusal")
def waits_for_a_refused_side(stack: ExitStack) -> None:
    """Prompts are kept for prefill workers whose blocks the decode side can never read."""
    edit(stack, Seating, "_may_prefill", " and not self._members.refusal(pool.id, home.id)", "")
