"""Bugs in the worker's machine: batcher, line-up, seals, reports."""

from contextlib import ExitStack

from msgspec import structs

from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import Join, Seal
from diptych.engine.core.plan import StepPlan
from diptych.engine.core.request import Sequence
from diptych.engine.core.types import pack_ids
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.commands import BatcherInput, CommitBlock
from diptych.scheduler.lineup import Lineup
from diptych.scheduler.report import Report
from diptych.scheduler.running import Running
from diptych.scheduler.seals import Seals
from tests.sim.mutants.registry import edit, mutant, replace


@mutant()
def commit_before_step(stack: ExitStack) -> None:
    """Blocks are committed on the page when their step is planned, not when it is over."""
    original = Batcher.plan

    def plan(self: Batcher) -> StepPlan:
        planned = original(self)
        size = self._block_size
        for row in planned.rows:
            seq, root = row.seq, row.seq.request.root
            names = extend_chain(root, pack_ids(seq.tokens[: row.start + row.length]), size)
            for i in range(row.start // size, len(names)):
                block, generation = seq.block_table[i], seq.generations[i]
                parent = names[i - 1] if i else root
                self._commands.append(CommitBlock(block, generation, names[i], parent))
        return planned

    replace(stack, Batcher, "plan", plan)


@mutant()
def page_entry_not_cleared(stack: ExitStack) -> None:
    """The page keeps the old entry of a block that is about to be written."""
    replace(stack, Running, "voided", lambda self, first: [])


@mutant()
def report_before_page(stack: ExitStack) -> None:
    """Sends overtake the page writes that went before them."""

    def take(self: Batcher) -> list[object]:
        commands = original(self)
        return sorted(commands, key=lambda command: isinstance(command, CommitBlock))

    original = Batcher.take
    replace(stack, Batcher, "take", take)


@mutant("mid_step", "disconnect")
def released_during_step(stack: ExitStack) -> None:
    """What arrives during a step takes effect at once."""
    edit(stack, Batcher, "handle", "if self._in_flight is not None:", "if False:")


@mutant("scheduler_crash", "clog", "crash_loop")
def batcher_takes_old_epoch(stack: ExitStack) -> None:
    """A message of an older scheduler changes a worker."""

    def handle(self: Batcher, message: BatcherInput) -> None:
        if not isinstance(message, Join | Seal) and self._epoch is not None:
            message = structs.replace(message, scheduler_epoch=self._epoch)
        original(self, message)

    original = Batcher.handle
    replace(stack, Batcher, "handle", handle)


@mutant("scheduler_crash")
def join_keeps_sequences(stack: ExitStack) -> None:
    """A worker that joins a new scheduler goes on with what the old one gave it."""
    edit(stack, Batcher, "_join", "self._lineup.clear()", "pass")


@mutant("clog")
def early_seal_dropped(stack: ExitStack) -> None:
    """A seal that overtakes its assignment is forgotten."""
    replace(stack, Seals, "hold", lambda self, seal: None)


@mutant()
def decode_repeats_wrong_index(stack: ExitStack) -> None:
    """The decode side repeats token 0 at the index of the next one."""
    edit(stack, Running, "news", "        first -= 1\n", "")


@mutant("worker_crash")
def position_forgets_attempts(stack: ExitStack) -> None:
    """The random number's position counts the tokens of this attempt only."""

    def num_emitted(self: Sequence) -> int:
        return len(self.tokens) - self.request.num_prompt - min(self.ref.attempt, 1)

    replace(stack, Sequence, "num_emitted", property(num_emitted))


@mutant("tiny_pool")
def writes_without_room(stack: ExitStack) -> None:
    """A decode goes on although its table is full."""

    def room(self: Running, block_size: int) -> int:
        return 1

    replace(stack, Running, "room", room)


@mutant()
def uneventful_tokens_not_sent(stack: ExitStack) -> None:
    """Tokens of uneventful steps are not sent, so that only a gap brings them back."""
    edit(stack, Batcher, "_commit_decodes", "items = outbox.items", "items = []")


@mutant()
def steps_not_reported(stack: ExitStack) -> None:
    """The scheduler never hears how much was computed."""
    replace(stack, Report, "add_step", lambda self, compute_s, prefill, decode: None)


@mutant("tiny_pool")
def starved_not_fed(stack: ExitStack) -> None:
    """A sequence that sat out a step never comes back."""
    replace(stack, Lineup, "feed", lambda self, run: None)


@mutant("prefix")
def wrong_parent_hash(stack: ExitStack) -> None:
    """The hash chain of a generated block starts over."""
    chain = "hashes[-1] if hashes else self.seq.request.root"
    edit(stack, Running, "_hashes", chain, "self.seq.request.root")
