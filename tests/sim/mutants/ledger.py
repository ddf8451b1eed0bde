"""Bugs in who holds which block: ledger, prefix cache, what is recovered from a page."""

from contextlib import ExitStack

from diptych.engine.core.types import BlockId
from diptych.scheduler.ledger import PoolLedger
from diptych.scheduler.members import Members, Pool
from diptych.scheduler.prefix_cache import PrefixCache
from diptych.scheduler.rows import Row
from diptych.scheduler.runs import Runs
from diptych.scheduler.seating import Seating
from diptych.transfer.control_page import ControlPage
from tests.sim.mutants.registry import edit, mutant, replace


@mutant()
def generation_not_raised(stack: ExitStack) -> None:
    """A block is reused in its old life."""
    edit(stack, PoolLedger, "allocate", "self.generations[block] += 1", "pass")


@mutant("scheduler_crash")
def generations_not_adopted(stack: ExitStack) -> None:
    """A new scheduler counts generations from nothing."""
    edit(stack, PoolLedger, "adopt", "list(generations)", "[0] * self.num_blocks")


@mutant("scheduler_crash", "prefix", "tiny_pool")
def torn_entry_recovered(stack: ExitStack) -> None:
    """A page entry counts as valid although its block was being written again."""
    edit(stack, ControlPage, "read_all", "generation == done and generation > 0", "done > 0")


@mutant("scheduler_crash", "hang")
def pool_read_too_early(stack: ExitStack) -> None:
    """The page is read while a worker may still run for the old scheduler."""

    def is_quiet(self: Members, pool: Pool) -> bool:
        return any(worker.joined for worker in pool.workers.values())

    replace(stack, Members, "is_quiet", is_quiet)


@mutant("disconnect")
def freed_before_released(stack: ExitStack) -> None:
    """Blocks of a revoked sequence are given away before its worker let go."""
    edit(
        stack,
        Runs,
        "take_back",
        "self._outbox.revoke(self._members.workers[worker], row.ref)",
        "self._outbox.revoke(self._members.workers[worker], row.ref)\n"
        "    for worker in list(row.holds):\n"
        "        if but is None or worker != but.id:\n"
        "            self.let_go(row, self._members.workers[worker])",
    )


@mutant()
def block_granted_twice(stack: ExitStack) -> None:
    """A granted block stays among the free ones."""
    edit(
        stack,
        PoolLedger,
        "allocate",
        "block = self._free.popleft()",
        "block = self._free[0]\n"
        "        self._free.rotate(-1)\n"
        "        if len(taken) or len(self._free) > 3: self._free.remove(block)",
    )


@mutant("prefix")
def hit_covers_last_token(stack: ExitStack) -> None:
    """A fully cached prompt leaves nothing to compute."""
    edit(stack, Seating, "_found", "(row.tokens_wanted() - 1)", "row.tokens_wanted()")


@mutant("prefix")
def partial_block_shared(stack: ExitStack) -> None:
    """A block is found by hash before it is full."""

    def announce(self: Runs, row: Row) -> None:
        original(self, row)
        for i, name in enumerate(row.wanted.hashes[: len(row.table)]):
            parent = row.wanted.hashes[i - 1] if i else row.entry.request.root
            ledger = self._members.pools[row.pool].ledger
            if ledger.state(row.table[i]).name == "PRIVATE":
                ledger.commit(row.table[i], ledger.generations[row.table[i]], name, parent)

    original = Runs._announce
    replace(stack, Runs, "_announce", announce)


@mutant("tiny_pool", "prefix")
def evicts_used_block(stack: ExitStack) -> None:
    """The cache gives up a block that is in use."""

    def share(self: PoolLedger, blocks: list[BlockId]) -> None:
        blocks = list(blocks)
        parked = [b for b in blocks if self.cache.is_parked(b)]
        original(self, blocks)
        for block in parked[-1:]:
            self._free.appendleft(block)

    original = PoolLedger.share
    replace(stack, PoolLedger, "share", share)


@mutant("tiny_pool", "prefix", "scheduler_crash")
def evicts_inner_block(stack: ExitStack) -> None:
    """Eviction takes the oldest block, whether others follow it or not."""
    replace(stack, PrefixCache, "_oldest_leaf", lambda self: None)


@mutant("prefix", "prompt_logprobs")
def cache_hides_prompt_logprobs(stack: ExitStack) -> None:
    """A request for prompt logprobs uses the cache."""
    edit(stack, Seating, "_found", " or row.wanted.want_prompt_logprobs", "")


@mutant("prefix", "choices")
def leak_shared(stack: ExitStack) -> None:
    """The second user of a block is not counted off."""
    edit(
        stack,
        PoolLedger,
        "release",
        "self._uses[block] -= 1",
        "self._uses[block] -= self._uses[block] < 2",
    )
