"""Bugs in the supervisor's decisions."""

from contextlib import ExitStack

from diptych.engine.core.types import DownCause
from diptych.scheduler.members import Members
from diptych.scheduler.scheduler import Scheduler
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


@mutant("lost_host", "far", "prefix")
def lost_pool_not_announced(stack: ExitStack) -> None:
    """The scheduler hears of a lost host's workers, but not of its memory."""
    edit(stack, Fleet, "leave", "self._tell_scheduler(PoolDown(pool.pool))", "pass")


@mutant("lost_host", "far", "scheduler_crash", "crash_loop")
def lost_hosts_kept_from_new_scheduler(stack: ExitStack) -> None:
    """A new scheduler waits for those that decoded on a host which is gone for good."""
    edit(stack, Fleet, "_tell_scheduler_everything", "apart=self._apart", "apart=False")


@mutant("lost_host", "far", "prefix")
def lost_pool_still_used(stack: ExitStack) -> None:
    """A lost pool stays in use for the scheduler."""
    edit(stack, Scheduler, "_on_pool_down", "self._members.pool_down(pool)", "pass")


@mutant("lost_host", "far", "burst")
def lost_pool_forgotten_early(stack: ExitStack) -> None:
    """A lost pool is forgotten while rows elsewhere still name its blocks."""
    edit(stack, Members, "sweep", " and pool.is_idle", "")
