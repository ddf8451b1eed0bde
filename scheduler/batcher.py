"""The worker's machine: which sequences it holds and what runs in each of its steps. Pure.

Owns the `Sequence`s of one worker. A shell calls `handle` for each message, then `plan`, carries
out `take` (page writes come before the step that writes those blocks), runs the plan, calls
`commit` and carries out `take` again. Invariant: between `plan` and `commit` no sequence of the
plan changes; what arrives meanwhile takes effect after the commit.
"""

from typing import cast

from diptych.engine.core.config import BatchOptions
from diptych.engine.core.handoff import Pulled, PullEnded
from diptych.engine.core.messages import (
    Assign,
    Grant,
    Grants,
    Handoff,
    Join,
    Joined,
    Landed,
    Revoke,
    Seal,
    Tokens,
)
from diptych.engine.core.plan import FinishInfo, Sample, StepPlan, StepResult, StepRow
from diptych.engine.core.types import Epoch, FinishReason, Role, WorkerId, blocks_for
from diptych.scheduler import exchange
from diptych.scheduler.commands import BatcherCommand, BatcherInput, CommitBlock
from diptych.scheduler.lineup import Lineup
from diptych.scheduler.report import Report, to_scheduler
from diptych.scheduler.running import Outbox, Phase, Running, running_from
from diptych.scheduler.seals import Seals, seal_of
from diptych.scheduler.step_plan import StepPlanner


class Batcher:
    """Continuous batching with chunked prefill; docs/ARCHITECTURE.md has the contract."""

    def __init__(
        self,
        worker: WorkerId,
        worker_epoch: Epoch,
        options: BatchOptions,
        *,
        block_size: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._worker, self._worker_epoch = worker, worker_epoch
        self._block_size, self._eos = block_size, eos_token_ids
        self._max_model_len = max_model_len
        self._epoch: Epoch | None = None  # of the scheduler that is served
        self.dial = 0  # share of step time for prefill, 0..100; set by messages only
        self._lineup = Lineup(block_size)
        self._planner = StepPlanner(self._lineup, options, block_size)
        self._seals = Seals()
        self._exchange = exchange.Exchange()
        self._report = Report()
        self._commands: list[BatcherCommand] = []
        self._in_flight: tuple[StepPlan, list[Running]] | None = None  # rows, same order
        self._deferred: list[BatcherInput] = []  # arrived during the step
        self._chunks: list[tuple[Running, bool]] = []  # of the last step; True: sampled
        self._settled = True  # nothing of the last step is left to do

    @property
    def has_work(self) -> bool:
        """Whether a step might compute something now."""
        return bool(self._lineup.decodes or self._lineup.prefills)

    @property
    def num_sequences(self) -> int:
        return len(self._lineup)

    # ---- messages ------------------------------------------------------------------------------

    def handle(self, message: BatcherInput) -> None:
        """Take note of a message. One of another epoch or incarnation changes nothing."""
        self._settle()
        if self._in_flight is not None:
            self._deferred.append(message)
        elif isinstance(message, Join):
            self._join(message)
        elif isinstance(message, Seal):
            self._take_seal(message)
        elif isinstance(message, Pulled):
            self._pulled(message)
        elif isinstance(message, PullEnded):
            self._pull_ended(message)
        elif message.worker_epoch == self._worker_epoch and message.scheduler_epoch == self._epoch:
            if isinstance(message, Assign):
                self._assign(message)
            elif isinstance(message, Grants):
                for grant in message.grants:
                    self._grant(grant)
            elif isinstance(message, Revoke):
                self._revoke(message)
            else:
                self.dial = message.dial

    def _join(self, join: Join) -> None:
        if join.worker_epoch != self._worker_epoch:
            return
        if self._epoch is not None and join.scheduler_epoch < self._epoch:
            return
        if join.scheduler_epoch != self._epoch:
            self._lineup.clear()
            self._commands += self._exchange.drop_all()
            self._seals.forget_before(join.scheduler_epoch)
            self._report = Report()
            self._epoch = join.scheduler_epoch
        self.dial = join.dial
        self._exchange.join_due = True
        self._say_joined()

    def _say_joined(self) -> None:
        """Once nothing of an older scheduler is being read into its blocks any more."""
        if not self._exchange.join_due or self._exchange.stale:
            return
        assert self._epoch is not None
        self._exchange.join_due = False
        joined = Joined(self._epoch, self._worker, self._worker_epoch)
        self._commands.append(to_scheduler(self._epoch, joined))

    def _assign(self, assign: Assign) -> None:
        outbox = self._lineup.outbox(assign.api, assign.api_epoch)
        run = running_from(assign, outbox, self._eos, self._max_model_len, self._block_size)
        self._lineup.add(run)
        num_here = run.seq.num_computed // self._block_size
        if run.phase is not Phase.AWAITING_SEAL:
            self._commands += run.voided(num_here)
            self._publish(run, num_here)  # what was cached
            if assign.prefix is not None:
                self._pull(run, assign.prefix)
            elif run.seq.num_computed >= run.prefill_end:
                self._end_head(run)
            return
        if run.handoff is not None:  # its blocks are its own from the start
            self._commands += run.voided(num_here)
            self._commands += exchange.prefix_orders(run, assign)
            self._pull(run, run.handoff)
        if (seal := self._seals.claim(run.ref)) is not None:
            self._take_seal(seal)

    def _take_seal(self, seal: Seal) -> None:
        """The peer's blocks and first token become this worker's."""
        if seal.peer_epoch != self._worker_epoch:
            return
        if self._epoch is None or seal.scheduler_epoch < self._epoch:
            return
        run = self._lineup.get(seal.ref)
        if run is None:
            self._seals.hold(seal)
            return
        if run.phase is not Phase.AWAITING_SEAL or run.peer != (seal.worker, seal.worker_epoch):
            return
        assert seal.num_computed == len(run.tokens), "the seal ends the whole prefill"
        if run.pulling:
            run.early_seal = seal
            return
        self._open(run, seal)

    def _open(self, run: Running, seal: Seal) -> None:
        """The prompt's KV is in this worker's pool and the first token is known."""
        run.seq.num_computed = seal.num_computed
        if run.handoff is None:
            run.seq.num_committed = seal.num_computed // self._block_size  # reported by the peer
            self._commands += run.voided(run.seq.num_committed)
        else:
            self._commit_blocks(run)
        run.tokens.append(seal.token)
        run.seal = seal
        self._lineup.to_decode(run)

    # ---- blocks that come from another memory domain -------------------------------------------

    def _pull(self, run: Running, handoff: Handoff) -> None:
        assert self._epoch is not None
        self._commands.append(exchange.pull_order(run, handoff, self._epoch))
        self._exchange.pulling.add(run.ref)
        run.pulling = True

    def _pulled(self, news: Pulled) -> None:
        """Full blocks are committed as they come; the last one only with the seal."""
        run = self._lineup.get(news.ref)
        if run is None or not run.pulling:
            return
        full = min(news.upto, (len(run.tokens) - 1) // self._block_size)
        run.seq.num_computed = full * self._block_size
        self._commit_blocks(run)

    def _pull_ended(self, news: PullEnded) -> None:
        """Nothing is read into the blocks of this sequence any more."""
        self._report.refused += news.refused
        if self._exchange.ended(news.ref):
            self._report.released.append(news.ref)
        self._say_joined()
        run = self._lineup.get(news.ref)
        if run is None or not run.pulling:
            return
        run.pulling = False
        if run.phase is Phase.PULLING:  # whatever did not come is computed
            run.num_cached = run.cached_of(run.seq.num_computed)
            self._lineup.to_prefill(run)
        elif not news.complete:  # the source cannot give them: another attempt finds what is here
            if run.early_seal is None:
                self._seals.void(run.ref)
            self._lineup.remove(run)
            self._report.released.append(news.ref)
            return
        self._report.landed.append(Landed(news.ref, news.num_blocks, news.read_s))
        if run.early_seal is not None:
            seal, run.early_seal = run.early_seal, None
            self._open(run, seal)

    def _publish(self, run: Running, upto: int) -> None:
        assert self._epoch is not None
        self._commands += exchange.publish_orders(run, upto, self._epoch)

    def _grant(self, grant: Grant) -> None:
        if (run := self._lineup.get(grant.ref)) is None:
            return  # it ended while the grant was under way
        seq = run.seq
        assert grant.first == len(seq.block_table), "grants are contiguous and in order"
        seq.block_table.extend(grant.blocks)
        seq.generations.extend(grant.generations)
        if run.phase is not Phase.AWAITING_SEAL or run.handoff is not None:
            self._commands += run.voided(grant.first)
        self._lineup.feed(run)

    def _revoke(self, revoke: Revoke) -> None:
        if (run := self._lineup.get(revoke.ref)) is not None:
            if run.phase is Phase.AWAITING_SEAL and run.early_seal is None:
                self._seals.void(run.ref)
            self._lineup.remove(run)
            self._commands += exchange.forget_orders(run)
        cancel = self._exchange.revoke(revoke.ref)
        if cancel is None:
            self._report.released.append(revoke.ref)
        else:  # released once its reads are drained
            self._commands.append(cancel)

    # ---- a step --------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """What to run now: all decodes, then prefill chunks within the budget. May be empty."""
        assert self._in_flight is None, "one step at a time"
        self._settle()
        plan, runs = self._planner.plan(self.dial, self._report.starved)
        if not plan.empty:
            self._in_flight = plan, runs
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """The step is over: take in what it computed and sampled.

        Seals come first, for `take_seals`: a client's next token waits for them, and nobody for
        the page entries. Until the scheduler reads `sealed` in the report behind them the blocks
        stay this worker's.
        """
        if plan.empty:
            return
        assert self._in_flight is not None
        assert self._in_flight[0] is plan
        runs = self._in_flight[1]
        assert len(result.samples) == len(runs)
        self._in_flight = None
        self._planner.stepped(plan, result.compute_s)
        num_decodes = plan.num_decodes
        self._report.add_step(result.compute_s, plan.num_tokens - num_decodes, num_decodes)
        self._commit_decodes(runs[:num_decodes], result.samples)
        for i in range(num_decodes, len(runs)):
            self._commit_chunk(runs[i], plan.rows[i], result, i)
        self._settled = False

    def take_seals(self) -> list[BatcherCommand]:
        """What the last step's first tokens order, ahead of `take`."""
        seals, self._commands = self._commands, []
        return seals

    def _settle(self) -> None:
        """The rest of a step that was committed."""
        if self._settled:
            return
        self._settled = True
        for run, sampled in self._chunks:
            self._commit_blocks(run)
            if not sampled and run.seq.num_computed >= run.prefill_end:
                self._end_head(run)
        self._chunks.clear()
        assert self._epoch is not None
        self._commands += self._lineup.take_batches(self._epoch, self._worker, self._worker_epoch)
        deferred, self._deferred = self._deferred, []
        for message in deferred:
            self.handle(message)

    def _commit_decodes(self, runs: list[Running], samples: list[Sample | None]) -> None:
        """One token each. This loop is the cost of an uneventful step."""
        outbox: Outbox | None = None
        items: list[Tokens] = []
        for run, sample in zip(runs, cast("list[Sample]", samples), strict=False):
            token = sample.token
            tokens = run.tokens
            tokens.append(token)
            length = len(tokens)
            run.seq.num_computed = length - 1
            if length >= run.event or token in run.stops or sample.error is not None:
                self._eventful(run, sample)
                continue
            if run.outbox is not outbox:
                outbox = run.outbox
                items = outbox.items
            logprobs = None if sample.logprobs is None else [sample.logprobs]
            first = length - run.num_prompt - 1
            items.append(Tokens(run.ref, first, [token], logprobs, None, run.num_cached, None))

    def _eventful(self, run: Running, sample: Sample) -> None:
        """A decode's token that fills a block, ends the sequence, or is the first after a seal."""
        self._commit_blocks(run)
        if sample.error is not None:
            run.tokens.pop()
        seal, run.seal = run.seal, None
        finish = self._finish(run, sample)
        run.outbox.items.append(run.news(sample, finish, seal))
        if finish is None:
            run.event = run.next_event(self._block_size)
            self._lineup.at_block_end(run)

    def _commit_chunk(self, run: Running, row: StepRow, result: StepResult, index: int) -> None:
        """A chunk of a prompt; its last one also brings the first token."""
        run.seq.num_computed += row.length
        if run.seq.want_prompt_logprobs:
            run.seq.prompt_logprobs.extend(result.prompt_logprobs.get(index, ()))
        if not row.sample:
            self._publish(run, run.seq.num_computed // self._block_size)
        else:
            sample = result.samples[index]
            assert sample is not None, "the last chunk samples"
            self._first_token(run, sample)
        self._chunks.append((run, row.sample))

    def _end_head(self, run: Running) -> None:  # the peer pulls it, and goes on
        self._report.sealed.append(run.ref)
        self._lineup.remove(run)

    def _first_token(self, run: Running, sample: Sample) -> None:
        """To the client from here; then the sequence decodes here or goes to its peer."""
        if sample.error is None:
            run.tokens.append(sample.token)
        finish = self._finish(run, sample)
        run.outbox.items.append(run.news(sample, finish, prompt_logprobs=run.prompt_logprobs()))
        if finish is not None:
            return
        if run.seq.role is Role.LOCAL:
            self._lineup.to_decode(run)
            return
        self._seal(run, sample)

    def _seal(self, run: Running, sample: Sample) -> None:
        """Hand the sequence to its peer."""
        assert self._epoch is not None
        self._publish(run, blocks_for(run.seq.num_computed, self._block_size))
        seal = seal_of(run, sample, self._epoch, self._worker, self._worker_epoch)
        self._commands.append(seal)
        self._report.sealed.append(run.ref)
        self._lineup.remove(run)

    def _commit_blocks(self, run: Running) -> None:
        for block in run.commit_full(self._block_size):
            self._commands.append(
                CommitBlock(block.block, block.generation, block.hash, block.parent)
            )
            self._report.committed.append(block)

    def _finish(self, run: Running, sample: Sample) -> FinishInfo | None:
        """Whether the sequence is over; if so it is forgotten here."""
        finish = run.finish(self._eos)
        if sample.error is not None:
            finish = FinishInfo(FinishReason.ERROR, None, sample.error)
        if finish is not None:
            self._report.finished.append(run.ref)
            self._lineup.remove(run)
            self._commands += exchange.forget_orders(run)
        return finish

    # ---- output --------------------------------------------------------------------------------

    def take(self) -> list[BatcherCommand]:
        """What the shell has to do now, in this order."""
        self._settle()
        if self._epoch is not None and self._report.due:
            self._commands.append(self._report.take(self._epoch, self._worker, self._worker_epoch))
        commands, self._commands = self._commands, []
        return commands

    def check_integrity(self) -> None:
        """Assert what must hold between calls. For tests and idle workers."""
        self._settle()
        assert self._in_flight is not None or not self._deferred
        if self._in_flight is None:
            self._lineup.check_integrity()
