"""Bugs in what moves workers: their dials, and how many there are."""

from contextlib import ExitStack

from diptych.engine.core.messages import Message, SetDial
from diptych.scheduler import dials, steering
from diptych.scheduler.autoscaler import Autoscaler
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.members import Worker
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.runs import Runs
from diptych.scheduler.scaling import Scaling
from diptych.scheduler.scheduler import Scheduler
from diptych.server.fleet import Fleet
from tests.sim.mutants.registry import edit, mutant, replace


@mutant("dials", "burst")
def dial_not_told(stack: ExitStack) -> None:
    """The scheduler moves a worker and does not tell it."""

    def to_worker(self: Outbox, worker: Worker, message: Message) -> None:
        if not isinstance(message, SetDial):
            original(self, worker, message)

    original = Outbox.to_worker
    replace(stack, Outbox, "to_worker", to_worker)


@mutant("dials", "burst")
def dial_ignored(stack: ExitStack) -> None:
    """A worker goes on as before."""
    edit(stack, Batcher, "handle", "self.dial = message.dial", "pass")


@mutant("dials", "burst", "worker_crash")
def dial_to_old_incarnation(stack: ExitStack) -> None:
    """A new dial names the worker's first epoch, whichever lives."""

    def to_worker(self: Outbox, worker: Worker, message: Message) -> None:
        if isinstance(message, SetDial):
            message = SetDial(message.scheduler_epoch, 1, message.dial)
        original(self, worker, message)

    original = Outbox.to_worker
    replace(stack, Outbox, "to_worker", to_worker)


@mutant("dials", "burst")
def role_emptied(stack: ExitStack) -> None:
    """Those that should do both decode only, though nobody else prefills."""
    edit(stack, dials, "moves_to", "len(order) - split.decode:", "split.prefill:")


@mutant("dials", "worker_crash", "crash_loop", "burst")
def lost_role_not_taken_over(stack: ExitStack) -> None:
    """A role whose only worker died has none until it is back."""
    replace(stack, steering, "repair", lambda workers: [])


@mutant("dials", "worker_crash", "burst")
def dial_forgotten_at_restart(stack: ExitStack) -> None:
    """A worker that comes back is told the dial that it was started with, not the one it has."""
    edit(stack, Scheduler, "_on_worker_up", "self._steering.dial_of(message)", "None")


@mutant("dials", "burst")
def dial_out_of_range(stack: ExitStack) -> None:
    """A move goes past the end of the scale."""
    edit(stack, dials, "moves_to", "dial = 100", "dial = 100 + HALF")


@mutant("autoscale", "burst")
def leaving_worker_gets_rows(stack: ExitStack) -> None:
    """A worker that leaves is given new rows."""
    edit(stack, Worker, "serves", " and not self.leaving", "")


@mutant("autoscale", "burst")
def retired_before_it_is_empty(stack: ExitStack) -> None:
    """A worker is told to exit while it runs something."""
    edit(stack, Scaling, "_see_off", "if worker.is_empty:", "if True:")


@mutant("autoscale", "burst")
def nobody_is_asked_for(stack: ExitStack) -> None:
    """Rows wait, and no worker is asked for."""
    edit(stack, Scaling, "_reach", "self._tell(Grow(self._outbox.epoch, wanted))", "pass")


@mutant("autoscale")
def fewer_than_the_least(stack: ExitStack) -> None:
    """The lower limit is not kept."""
    edit(stack, Autoscaler, "decide", "num_workers <= self._fewest", "num_workers <= 0")


@mutant("autoscale", "burst")
def displaced_row_not_revoked(stack: ExitStack) -> None:
    """What a leaving worker could not finish is not taken from it."""
    edit(stack, Runs, "displace", "self.take_back(row)", "self._stop(row)")


@mutant("autoscale", "burst")
def retired_worker_comes_back(stack: ExitStack) -> None:
    """The supervisor starts again what it was told to end."""
    edit(stack, Fleet, "_may_start", "self._can_fork and member.wanted", "self._can_fork")


@mutant("autoscale")
def retired_worker_not_announced_down(stack: ExitStack) -> None:
    """The scheduler never hears that a worker has left."""
    edit(
        stack,
        Fleet,
        "exited",
        "self._tell_of_exit(member, cause)",
        "member.wanted and self._tell_of_exit(member, cause)",
    )


@mutant("autoscale", "burst")
def weights_go_too_early(stack: ExitStack) -> None:
    """The weights are let go while a worker still runs."""
    edit(
        stack,
        Fleet,
        "_rest_or_wake",
        "if all(member.state is State.DOWN for member in self._workers):",
        "if True:",
    )


@mutant("autoscale", "burst")
def never_woken(stack: ExitStack) -> None:
    """From zero there is no way back."""
    edit(stack, Fleet, "_rest_or_wake", "self._commands.append(Wake())", "pass")
