"""A simulated worker: the real batcher, a step that takes virtual time, a fake model.

Owns one incarnation's batcher and its step in flight. Commands are carried out one by one, and the
process may die between any two of them, and between the parts of a page entry.
"""

from diptych.engine.core.config import WorkerSpec
from diptych.engine.core.handoff import TransferNews
from diptych.engine.core.messages import (
    Address,
    AskPublish,
    Assign,
    Drain,
    Grants,
    Join,
    Joined,
    Message,
    Progress,
    Publish,
    PullOver,
    Revoke,
    Seal,
    Send,
    SetDial,
)
from diptych.engine.core.plan import Sample, StepPlan, StepResult, StepRow, TokenLogprobs
from diptych.engine.core.request import Sequence
from diptych.engine.core.types import DownCause, PoolId
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.commands import BatcherCommand, ClearBlock, CommitBlock
from tests.sim.clients import Clients
from tests.sim.memory import Memory
from tests.sim.model import EOS, first_cell, logits_of, logprob_of, next_cell, sample
from tests.sim.transfers import Mover
from tests.sim.watch import Watch
from tests.sim.world import Crashed, Process, World, check


class WorkerProcess(Process):
    """One incarnation of one worker."""

    def __init__(
        self,
        world: World,
        address: Address,
        setup: WorkerSpec,
        memories: dict[PoolId, Memory],
        watch: Watch,
        clients: Clients,
    ) -> None:
        super().__init__(world, address, f"w{setup.worker}")
        scenario = world.scenario
        self.setup = setup
        self.memory = memories[setup.pool]
        self.watch = watch
        self.clients = clients
        self.mid_step = "mid_step" in scenario.features  # hears while a step runs
        self.eager = self.mid_step or scenario.seed % 2 == 0  # carries out after each message
        self.options = scenario.batch
        self.batcher = Batcher(
            setup.worker,
            address.epoch,
            scenario.batch,
            block_size=scenario.block_size,
            eos_token_ids=frozenset({EOS}),
            max_model_len=scenario.max_model_len,
        )
        self.mover = Mover(self, memories, self._hear_news)
        self.inbox: list[Message] = []
        self.plan: StepPlan | None = None  # the step in flight
        self.work = (0, 0, 0)  # steps, prefill and decode tokens since the last report
        self.serves: int | None = None  # the scheduler whose sequences it computes
        self.epoch = 0  # of the scheduler that it said to have joined
        self.wakes = False

    # ---- the loop ------------------------------------------------------------------------------

    def receive(self, message: Message) -> None:
        if isinstance(message, Drain):
            self._leave()
            return
        if isinstance(message, Publish | AskPublish | PullOver):
            self.mover.hear(message)
            return
        if self.plan is not None:
            if self.mid_step:
                self._handle(message)
                self._carry_out(self.batcher.take())
            else:
                self.inbox.append(message)
            return
        self.inbox.append(message)
        if not self.wakes:
            self.wakes = True
            self.world.at(self.world.rng.random() * 0.0002, self._wake, self)

    def _leave(self) -> None:
        """It was retired: nothing of it may be missed."""
        busy = self.batcher.num_sequences or self.plan is not None or self.mover.reads
        check(not busy, "{} is retired and holds {}", self.slot, self.batcher.num_sequences)
        self.world.leave(self)

    def _wake(self) -> None:
        self.wakes = False
        if self.plan is None:
            self._turn()

    def _turn(self) -> None:
        """Drains the inbox and begins the next step if there is anything to run."""
        inbox, self.inbox = self.inbox, []
        for message in inbox:
            self._handle(message)
            if self.eager:
                self._carry_out(self.batcher.take())
        self.op("plan")
        plan = self.batcher.plan()
        self.op("planned")
        self._carry_out(self.batcher.take())
        self.batcher.check_integrity()
        if not plan.empty:
            self._begin(plan)

    def _handle(self, message: Message) -> None:
        assert isinstance(message, Join | Assign | Grants | Revoke | SetDial | Seal), message
        self.op("handle")
        before = (self.batcher.num_sequences, len(self.batcher._commands))
        self.batcher.handle(message)
        after = (self.batcher.num_sequences, len(self.batcher._commands))
        stale = message.scheduler_epoch < self.epoch
        check(not stale or before == after, "{}: an old {} changes it", self.slot, message)
        self.batcher.check_integrity()

    def _hear_news(self, news: TransferNews) -> None:
        """Blocks came from another pool, or will not."""
        self.op("news")
        self.batcher.handle(news)
        self._carry_out(self.batcher.take())
        self.batcher.check_integrity()
        if self.plan is None and not self.wakes:
            self.wakes = True
            self.world.at(self.world.rng.random() * 0.0002, self._wake, self)

    def _carry_out(self, commands: list[BatcherCommand]) -> None:
        if self.serves != self.batcher._epoch:  # it joins once what it reads for the old is drained
            self.serves, self.work = self.batcher._epoch, (0, 0, 0)
        for command in commands:
            if isinstance(command, ClearBlock):
                self.op("clear")
                check(
                    self.memory.committed(command.block) < command.generation,
                    "{} clears block {} which is committed",
                    self.slot,
                    command.block,
                )
                self.memory.page.clear(command.block, command.generation)
            elif isinstance(command, CommitBlock):
                self._commit_block(command)
            elif not isinstance(command, Send):
                self.op("order")
                self.mover.order(command)
            else:
                if isinstance(command.message, Progress):
                    self._check_progress(command.message)
                elif isinstance(command.message, Joined):
                    self.epoch = command.message.scheduler_epoch
                self.send(command.to, command.message)
        self.mover.carry_out()

    def _commit_block(self, command: CommitBlock) -> None:
        block, memory = command.block, self.memory
        check(
            memory.generation(block) == command.generation,
            "{} commits block {} of another life",
            self.slot,
            block,
        )
        check(
            memory.cells[block] == self.clients.oracle.blocks.get(command.hash),
            "{} commits block {} with a wrong content",
            self.slot,
            block,
        )
        check(not self._writing(block), "{} commits block {} during its step", self.slot, block)
        try:
            self.op("page_hash")
        except Crashed:
            memory.tear(command)
            raise
        memory.page.commit(block, command.generation, command.hash, command.parent)
        self.op("page_commit")

    def _writing(self, block: int) -> bool:
        size = self.memory.block_size
        return self.plan is not None and any(
            block in row.seq.block_table[row.start // size : -(-(row.start + row.length) // size)]
            for row in self.plan.rows
        )

    def _check_progress(self, progress: Progress) -> None:
        told = (progress.steps, progress.prefill_tokens, progress.decode_tokens)
        check(told == self.work, "{} did {} but reports {}", self.slot, self.work, told)
        self.work = (0, 0, 0)
        for row in progress.committed:
            check(
                self.memory.committed(row.block) == row.generation,
                "{} reports block {} before its page entry",
                self.slot,
                row.block,
            )
        if self.plan is not None:
            gone = {*progress.finished, *progress.sealed, *progress.released}
            for step_row in self.plan.rows:
                check(
                    step_row.seq.ref not in gone,
                    "{} gives {} back during its step",
                    self.slot,
                    step_row.seq.ref,
                )

    # ---- a step --------------------------------------------------------------------------------

    def _begin(self, plan: StepPlan) -> None:
        self._check_plan(plan)
        self.plan = plan
        world, timing = self.world, self.world.timing
        self.op("write")
        poisoned = any(self._poisons(row) for row in plan.rows)
        self._touch(plan)
        for row in plan.rows:
            self._write(row, row.start + (row.length + 1) // 2)
        duration = timing.step_s * (0.5 + world.rng.random()) + timing.token_s * plan.num_tokens
        if world.rng.random() < 0.005:
            duration += timing.hang_s * 0.6  # slow, but no hang
        if world.hangs(self.slot):
            self.stuck = True
            world.on_hang(self)
            world.at(world.rng.random() * timing.hang_s, self._late_write)
        elif poisoned:
            world.at(duration * world.rng.random(), self._fault, self)
        else:
            world.at(duration, self._finish, self)

    def _late_write(self) -> None:
        """A hung step goes on writing until the process is gone."""
        if self.alive and self.plan is not None:
            self._touch(self.plan)
            for row in self.plan.rows:
                self._write(row, row.start + row.length)

    def _fault(self) -> None:
        self.cause = DownCause.FAULT
        assert self.plan is not None
        guilty = {row.seq.ref.request for row in self.plan.rows if self._poisons(row)}
        for request in sorted(guilty):
            client = self.clients.by_id[request]
            client.faults += 1
            most = (client.spec.n + 1) * self.epoch + 1
            check(client.faults <= most, "{} crashed {} workers", request, client.faults)
        self.world.kill(self)

    def _finish(self) -> None:
        plan = self.plan
        assert plan is not None
        self._touch(plan)
        samples: list[Sample | None] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for i, row in enumerate(plan.rows):
            cells = self._write(row, row.start + row.length)
            samples.append(self._sample(row, cells) if row.sample else None)
            if row.seq.want_prompt_logprobs:
                prompt_logprobs[i] = _prompt_logprobs(row, cells)
        result = StepResult(samples, prompt_logprobs, self.world.timing.step_s)
        self.op("commit")
        self.batcher.commit(plan, result)
        self.plan = None
        steps, prefill, decode = self.work
        prefill += plan.num_tokens - plan.num_decodes
        self.work = (steps + 1, prefill, decode + plan.num_decodes)
        self.op("committed")
        self._carry_out(self.batcher.take())
        self.batcher.check_integrity()
        self._turn()

    def _check_plan(self, plan: StepPlan) -> None:
        rows, options = plan.rows, self.options
        check(len(rows) <= options.max_num_seqs, "{} plans {} rows", self.slot, len(rows))
        check(sum(row.length for row in rows) == plan.num_tokens, "{}: num_tokens", self.slot)
        check(
            plan.num_tokens <= options.max_num_batched_tokens,
            "{} plans {} tokens",
            self.slot,
            plan.num_tokens,
        )
        refs = {row.seq.ref for row in rows}
        check(len(refs) == len(rows), "{} plans a sequence twice", self.slot)
        for i, row in enumerate(rows):
            check(row.length > 0 and row.start == row.seq.num_computed, "{}: row {}", self.slot, i)
            if i < plan.num_decodes:
                check(row.length == 1 and row.sample, "{}: decode row {}", self.slot, i)
            elif options.max_chunk_tokens is not None:
                check(
                    row.length <= options.max_chunk_tokens, "{}: chunk of {}", self.slot, row.length
                )

    def _touch(self, plan: StepPlan) -> None:
        if self.setup.worker in self.watch.lost:
            return
        for row in plan.rows:
            self.watch.touch(
                self.address.number, self.address.epoch, row.seq, row.start, row.start + row.length
            )

    def _poisons(self, row: StepRow) -> bool:
        spec = self.clients.by_id[row.seq.ref.request].spec
        return spec.poison_at is not None and row.start <= spec.poison_at < row.start + row.length

    def _write(self, row: StepRow, end: int) -> list[int]:
        """Writes the cells [start, end) and returns [0, end) as read through the block table."""
        seq, size, start = row.seq, self.memory.block_size, row.start
        pool, table = self.memory.cells, seq.block_table
        cells: list[int] = []
        for block in table[: -(-start // size)]:
            cells += pool[block]
        del cells[start:]
        self._check_read(seq, cells)
        cell = cells[-1] if cells else first_cell()
        tokens = seq.tokens
        for position in range(start, end):
            cell = next_cell(cell, tokens[position], position)
            pool[table[position // size]][position % size] = cell
            cells.append(cell)
        return cells

    def _check_read(self, seq: Sequence, cells: list[int]) -> None:
        client = self.clients.by_id[seq.ref.request]
        due = client.answers[seq.ref.choice].cells
        check(cells == due[: len(cells)], "{}: {} reads a wrong cell", self.slot, seq.ref)

    def _sample(self, row: StepRow, cells: list[int]) -> Sample:
        seq = row.seq
        params = seq.request.params
        spec = self.clients.by_id[seq.ref.request].spec
        check(len(cells) == len(seq.tokens), "{}: {} samples too early", self.slot, seq.ref)
        if spec.nan_at == seq.num_emitted:
            return Sample(0, error="the logits are not finite")
        logits = logits_of(cells)
        token = sample(
            logits,
            params.seed or 0,
            seq.ref.choice,
            row.start + row.length - 1,
            seq.num_emitted,
            seq.num_emitted >= params.min_tokens,
            params.stop_token_ids,
        )
        return Sample(token, logprob_of(logits, token) if params.logprobs is not None else None)


def _prompt_logprobs(row: StepRow, cells: list[int]) -> list[TokenLogprobs]:
    """Entries for the prompt positions start + 1 .. start + length of a row."""
    seq = row.seq
    last = min(row.start + row.length, seq.num_prompt - 1)
    return [
        logprob_of(logits_of(cells[:position]), seq.tokens[position])
        for position in range(row.start + 1, last + 1)
    ]
