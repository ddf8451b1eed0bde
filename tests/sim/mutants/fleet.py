"""Bugs in the supervisor's decisions."""

from contextlib import ExitStack

from diptych.engine.core.types import DownCause
from diptych.server.fleet import Fleet
from diptych.server.fleet_members import Member
from tests.sim.mutants.registry import edit, mutant, replace


@mutant("scheduler_crash", "hang")
def pool_before_workers(stack: ExitStack) -> None:
    """A new scheduler hears of the pool before it hears of the workers."""

    def tell(self: Fleet) -> None:
        for _, pool in self._pools:
            self._tell_scheduler(pool)
        original(self)

    original = Fleet._tell_scheduler_everything
    replace(stack, Fleet, "_tell_scheduler_everything", tell)


@mutant("scheduler_crash", "hang")
def fencing_worker_not_announced(stack: ExitStack) -> None:
    """A new scheduler does not hear of a worker that is being killed but is not gone."""
    edit(
        stack,
        Fleet,
        "_tell_scheduler_everything",
        "if member.announced:",
        "if member.state is State.UP and not member.hung:",
    )


@mutant("hang")
def down_before_exit(stack: ExitStack) -> None:
    """A worker is called down when it is killed, not when its exit was awaited."""

    def kill(self: Fleet, member: Member, reason: str, now: float) -> None:
        self._tell_of_exit(member, DownCause.HUNG)
        original(self, member, reason, now)

    original = Fleet._kill
    replace(stack, Fleet, "_kill", kill)


@mutant("scheduler_crash")
def api_not_told_of_scheduler(stack: ExitStack) -> None:
    """API servers do not hear of a new scheduler."""
    edit(stack, Fleet, "_tell_scheduler_everything", "SchedulerUp(", "SchedulerDown(")
