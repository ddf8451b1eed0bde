"""The sequences of one worker, sorted by what each can do next.

Owns the rows and the two lists that steps are built from: prefills in order of (priority, rank,
choice), decodes in order of arrival. Invariant: a sequence is in exactly the place that its phase
names, and a decode whose next token has no block leaves before the next step.
"""

from bisect import insort

from diptych.engine.core.messages import Address, Send, TokenBatch
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import ApiId, Epoch, WorkerId
from diptych.scheduler.commands import BatcherCommand
from diptych.scheduler.running import Outbox, Phase, Running


class Lineup:
    """Who is on the worker. `prefills` and `decodes` are for reading by the batcher only."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._running: dict[SeqRef, Running] = {}
        self._edge: list[Running] = []  # decodes that may need a block in their next step
        self._outboxes: dict[tuple[ApiId, Epoch], Outbox] = {}
        self._ended_decodes = False  # some are still listed
        self._turn = 0  # first decode of the next step, when not all fit in one
        self.prefills: list[Running] = []
        self.decodes: list[Running] = []

    def __len__(self) -> int:
        return len(self._running)

    def get(self, ref: SeqRef) -> Running | None:
        return self._running.get(ref)

    def outbox(self, api: ApiId, api_epoch: Epoch) -> Outbox:
        """Where tokens for this API server gather; made when first asked for."""
        key = (api, api_epoch)
        if key not in self._outboxes:
            self._outboxes[key] = Outbox(Address("api", api, api_epoch))
        return self._outboxes[key]

    def take_batches(
        self, epoch: Epoch, worker: WorkerId, worker_epoch: Epoch
    ) -> list[BatcherCommand]:
        """The tokens of one step, a message per API server that has some."""
        sends: list[BatcherCommand] = []
        for outbox in self._outboxes.values():
            if outbox.items:
                batch = TokenBatch(epoch, worker, worker_epoch, outbox.items)
                sends.append(Send(outbox.to, batch))
                outbox.items = []
        self._drop_idle_outboxes()
        return sends

    def _drop_idle_outboxes(self) -> None:
        """Forget API servers that nothing here sends to."""
        if any(not outbox.num_users for outbox in self._outboxes.values()):
            self._outboxes = {key: box for key, box in self._outboxes.items() if box.num_users}

    # ---- moves ---------------------------------------------------------------------------------

    def add(self, run: Running) -> None:
        assert run.ref not in self._running, "a sequence is assigned once"
        self._running[run.ref] = run
        run.outbox.num_users += 1
        if run.phase is Phase.PREFILL:
            insort(self.prefills, run, key=_order)

    def to_prefill(self, run: Running) -> None:
        """The cached blocks of its prompt that could be had are here."""
        assert run.phase is Phase.PULLING
        run.phase = Phase.PREFILL
        insort(self.prefills, run, key=_order)

    def to_decode(self, run: Running) -> None:
        """The prompt is computed and the first token sampled: one token per step from now on."""
        if run.phase is Phase.PREFILL:
            self.prefills.remove(run)
        run.phase = Phase.DECODE
        run.event = 1 if run.seal is not None else run.next_event(self._block_size)
        self.decodes.append(run)
        self._edge.append(run)

    def at_block_end(self, run: Running) -> None:
        """A decode's last block is full: its next step needs another."""
        self._edge.append(run)

    def starve(self, run: Running) -> None:
        """Out of the steps until a grant."""
        assert run.phase in (Phase.PREFILL, Phase.DECODE)
        if run.phase is Phase.PREFILL:
            self.prefills.remove(run)
        else:
            self._ended_decodes = True
        run.phase = Phase.STARVED

    def feed(self, run: Running) -> None:
        """Blocks were granted: a starved sequence is back in the next step."""
        if run.phase is not Phase.STARVED or run.room(self._block_size) <= 0:
            return
        if run.event:
            self.to_decode(run)
        else:
            run.phase = Phase.PREFILL
            insort(self.prefills, run, key=_order)

    def remove(self, run: Running) -> None:
        """The sequence is over on this worker."""
        if run.phase is Phase.PREFILL:
            self.prefills.remove(run)
        elif run.phase is Phase.DECODE:
            self._ended_decodes = True
        run.phase = Phase.ENDED
        del self._running[run.ref]
        run.outbox.num_users -= 1

    def clear(self) -> None:
        """Drop everything."""
        self._running.clear()
        self._edge.clear()
        self._outboxes.clear()
        self._ended_decodes = False
        self.prefills.clear()
        self.decodes.clear()

    # ---- before a step -------------------------------------------------------------------------

    def settle(self) -> list[Running]:
        """Make `decodes` ready for a step; returns those that sit out for want of a block."""
        starved = []
        if self._edge:
            for run in self._edge:
                if run.phase is Phase.DECODE and run.room(self._block_size) <= 0:
                    self.starve(run)
                    starved.append(run)
            self._edge.clear()
        if self._ended_decodes:
            self.decodes = [run for run in self.decodes if run.phase is Phase.DECODE]
            self._ended_decodes = False
        return starved

    def next_decodes(self, most: int) -> list[Running]:
        """All decodes, or `most` of them in turns. `settle` went before."""
        if len(self.decodes) <= most:
            return self.decodes
        first = self._turn % len(self.decodes)
        self._turn = first + most
        return (self.decodes[first:] + self.decodes[:first])[:most]

    # ---- checks --------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that phases, lists, tables and events agree. For tests and idle workers."""
        decodes = [run for run in self.decodes if run.phase is Phase.DECODE]
        assert self._ended_decodes or len(decodes) == len(self.decodes)
        for listed, phase in ((self.prefills, Phase.PREFILL), (decodes, Phase.DECODE)):
            assert {id(run) for run in listed} == {
                id(run) for run in self._running.values() if run.phase is phase
            }
            assert len(listed) == len(set(map(id, listed)))
        assert [run.order for run in self.prefills] == sorted(run.order for run in self.prefills)
        users: dict[int, int] = {}
        edge = {id(run) for run in self._edge}
        for ref, run in self._running.items():
            assert run.ref == ref
            assert run.phase is not Phase.ENDED
            users[id(run.outbox)] = users.get(id(run.outbox), 0) + 1
            self._check(run, id(run) in edge)
        for outbox in self._outboxes.values():
            assert outbox.num_users == users.pop(id(outbox), 0)
            assert not outbox.items, "tokens leave with their step"
        assert not users

    def _check(self, run: Running, on_edge: bool) -> None:
        seq, block_size = run.seq, self._block_size
        assert run.tokens is seq.tokens
        assert 0 <= seq.num_computed < len(seq.tokens)
        assert len(seq.block_table) == len(seq.generations)
        assert seq.num_committed == seq.num_computed // block_size, "full blocks are reported"
        if run.phase is not Phase.AWAITING_SEAL:
            assert seq.num_computed <= len(seq.block_table) * block_size
        if run.phase is Phase.DECODE:
            assert seq.num_uncomputed == 1
            assert run.event >= 1
            assert on_edge or run.room(block_size) > 0
            assert run.event == 1 or len(run.tokens) < run.event <= run.next_event(block_size)
        if run.phase is Phase.STARVED:
            assert run.room(block_size) <= 0


def _order(run: Running) -> tuple[int, int, int]:
    return run.order
