"""Bugs in moving blocks between memory domains."""

from contextlib import ExitStack

from diptych.engine.core.handoff import CancelPull
from diptych.engine.core.request import SeqRef
from diptych.scheduler import assigning, runs
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.exchange import Exchange
from diptych.scheduler.members import Members
from diptych.scheduler.runs import Runs
from diptych.scheduler.seating import Seating
from diptych.scheduler.step_plan import StepPlanner
from diptych.transfer import spans
from diptych.transfer.pull import Puller
from tests.sim.mutants.registry import edit, mutant, replace


@mutant("far", "transfer_faults")
def digest_not_checked(stack: ExitStack) -> None:
    """A block that arrived with a wrong bit is kept."""
    edit(stack, Puller, "read_done", "if digest == pull.digests[i]:", "if digest:")


@mutant("far", "transfer_faults")
def source_generation_not_checked(stack: ExitStack) -> None:
    """A block is kept that its source had given to somebody else by the end of the read."""
    edit(stack, Puller, "read_done", "if generation != pull.order.generations[i]:", "if False:")


@mutant("far", "tiny_pool", "burst")
def source_freed_before_landed(stack: ExitStack) -> None:
    """The prefill side's blocks are given away once it sealed, while they are being read."""
    edit(stack, Runs, "_free_source", "not source.landed or ", "")


@mutant("far")
def wrong_span(stack: ExitStack) -> None:
    """Neighbours at the source are taken for neighbours here."""
    edit(stack, spans, "_runs", " and mine == first_own + count", "")


@mutant("far", "disconnect", "clog", "burst", "tiny_pool")
def cancel_leaks(stack: ExitStack) -> None:
    """A revoked sequence is given back while a read still writes into its blocks."""

    def revoke(self: Exchange, ref: SeqRef) -> CancelPull | None:
        return None

    replace(stack, Exchange, "revoke", revoke)


@mutant("far", "scheduler_crash", "clog", "burst", "crash_loop")
def joined_before_drained(stack: ExitStack) -> None:
    """A worker joins a new scheduler while a read of the old one still writes."""
    edit(stack, Batcher, "_say_joined", " or self._exchange.stale", "")


@mutant("far", "scheduler_crash", "clog", "burst", "crash_loop")
def join_does_not_cancel(stack: ExitStack) -> None:
    """Pulls of an older scheduler go on."""
    edit(stack, Exchange, "drop_all", "self.stale |= self.pulling", "pass")


@mutant("far")
def own_blocks_not_voided(stack: ExitStack) -> None:
    """Blocks are read into while their old entries are still valid."""
    edit(
        stack,
        Batcher,
        "_assign",
        "if run.handoff is not None:",
        "if run.handoff is not None:\n        num_here = len(run.seq.block_table)",
    )


@mutant("far")
def published_before_full(stack: ExitStack) -> None:
    """A block is published while its last tokens are still to be computed."""
    edit(
        stack,
        Batcher,
        "_commit_chunk",
        "self._publish(run, run.seq.num_computed // self._block_size)",
        "self._publish(run, blocks_for(run.seq.num_computed, self._block_size))",
    )


@mutant("far", "transfer_loss")
def decodes_before_landed(stack: ExitStack) -> None:
    """The seal is enough, whether or not the blocks are here."""
    edit(stack, Batcher, "_take_seal", "if run.pulling:", "if False:")


@mutant("far", "transfer_loss")
def silence_never_ends(stack: ExitStack) -> None:
    """A lost publish is not asked for again."""
    edit(stack, Puller, "tick", "or now < pull.ask_at", "or True")


@mutant("far", "transfer_faults")
def failed_read_forgotten(stack: ExitStack) -> None:
    """Blocks whose read failed are neither read again nor given up."""
    edit(stack, Puller, "read_failed", "sorted(pull.waiting + blocks)", "pull.waiting")


@mutant("far")
def source_leaks(stack: ExitStack) -> None:
    """The prefill side's blocks stay allocated when an attempt is taken back."""
    edit(stack, Runs, "_drain", "if source is not None:", "if False:")


@mutant("far", "prefix")
def pulls_what_is_here(stack: ExitStack) -> None:
    """The hit of the prefill side is taken for that of the decode side."""
    edit(
        stack, assigning, "handoff", "source.table[row.num_hit :]", "source.table[source.num_hit :]"
    )


@mutant("far")
def tail_committed(stack: ExitStack) -> None:
    """The last, partial block of a prompt is named like a full one."""
    edit(
        stack,
        Batcher,
        "_pulled",
        "min(news.upto, (len(run.tokens) - 1) // self._block_size)",
        "news.upto",
    )


@mutant("far", "tiny_pool", "burst")
def no_credit(stack: ExitStack) -> None:
    """A prefill side is chosen without asking whether its pool has the blocks."""
    edit(
        stack,
        Seating,
        "_room_in",
        "return found if need - len(found) <= pool.ledger.num_available_beside(found) else None",
        "return found",
    )


@mutant("far", "prefix")
def prefix_taken_for_a_hit(stack: ExitStack) -> None:
    """What only the decode side's pool knows counts as known on the prefill side."""
    edit(
        stack,
        runs,
        "assignment",
        "row.source.table, row.source.num_hit",
        "row.source.table, row.source.num_start",
    )


@mutant("far", "prefix", "transfer_faults")
def unread_prefix_believed(stack: ExitStack) -> None:
    """A prefill side goes on as if all of the prefix had come."""
    edit(
        stack,
        Batcher,
        "_pull_ended",
        "run.pulling = False",
        "run.pulling = False\n"
        "    if run.phase is Phase.PULLING and run.handoff is not None:\n"
        "        run.seq.num_committed = run.handoff.first\n"
        "        run.seq.num_computed = run.handoff.first * self._block_size",
    )


@mutant("far", "prefix", "worker_crash", "crash_loop", "transfer_loss", "crowd")
def head_without_its_source(stack: ExitStack) -> None:
    """Who waits for the head of a prompt is not told that its source is gone."""
    edit(stack, Runs, "seal", "not is_here", "not (row.source is not None and row.source.is_head)")


@mutant("far", "prefix", "burst")
def cached_head_not_published(stack: ExitStack) -> None:
    """Blocks that need no computing are not shown to the side that waits for them."""
    edit(stack, Batcher, "_assign", "self._publish(run, num_here)  # what was cached", "pass")


@mutant("far", "prefix", "burst")
def head_samples(stack: ExitStack) -> None:
    """A token is drawn at the end of the head, as if it were the whole prompt."""
    edit(
        stack,
        StepPlanner,
        "_plan_prefills",
        "start + length == len(run.tokens)",
        "start + length == end",
    )


@mutant("far", "zombie", "worker_crash", "crash_loop", "burst")
def zombie_believed(stack: ExitStack) -> None:
    """What a fenced worker had said is taken for the word of the one that came after it."""
    edit(
        stack,
        Members,
        "worker",
        "return found if found is not None and found.epoch == epoch else None",
        "return found",
    )


@mutant("far", "slow_peer", "disconnect", "burst", "tiny_pool")
def slow_read_forgotten(stack: ExitStack) -> None:
    """A pull that was cancelled ends before its reads are drained."""
    edit(stack, Puller, "_finish_end", "if not pull.reads:", "if True:")


@mutant("far", "partition", "transfer_loss")
def asks_once(stack: ExitStack) -> None:
    """After one question the puller waits for ever."""
    edit(stack, Puller, "tick", "pull.ask_at = now + pull.ask_s", "pull.ask_at = now + 1e9")
