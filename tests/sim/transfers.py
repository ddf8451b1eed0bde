"""The transfer half of a simulated worker: the real machines over a backend with scripted faults.

Owns one incarnation's pulls and their reads in flight. A read writes its blocks one by one, torn in
the middle, in virtual time; a cancelled one goes on writing until it is drained. Invariants that it
checks: nothing is written into a block that the worker does not hold; a block that counts as here
holds what it should, and its source had the assigned generation after the read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from diptych.engine.core.handoff import (
    CancelPull,
    ForgetPublished,
    PublishBlocks,
    Pulled,
    StartPull,
    TransferNews,
    TransferOrder,
)
from diptych.engine.core.messages import Address, AskPublish, Publish, PullOver, Send
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import BlockId, Generation, PoolId
from diptych.transfer.publish import Publisher
from diptych.transfer.pull import Puller
from diptych.transfer.spans import CancelRead, Read, ReadDone, ReadFailed
from tests.sim.memory import Memory
from tests.sim.world import Process, check

SLOW: Final = 50.0
"""So many network delays more a block from a slow peer takes, at most."""


@dataclass(slots=True)
class SimRead:
    """A read in flight."""

    read: Read
    ref: SeqRef
    pairs: list[tuple[BlockId, BlockId]]  # (source, own)
    cancelled: bool = False


def digest(cells: list[int]) -> int:
    return hash(tuple(cells)) & 0xFFFFFFFFFFFFFFFF


class Mover:
    """`on_news` gets what the batcher has to hear."""

    def __init__(
        self,
        process: Process,
        memories: dict[PoolId, Memory],
        on_news: Callable[[TransferNews], None],
    ) -> None:
        self.process = process
        self.world = process.world
        self.memories = memories
        self.watch = process.watch  # type: ignore[attr-defined]
        self.memory: Memory = process.memory  # type: ignore[attr-defined]
        self.on_news = on_news
        address = process.address
        self.puller = Puller(address.number, address.epoch)
        self.publisher = Publisher(address.number, address.epoch, "sim")
        self.reads: dict[int, SimRead] = {}
        self.orders: dict[SeqRef, StartPull] = {}
        self.num_here: dict[SeqRef, int] = {}
        self.last_seen: dict[tuple[SeqRef, BlockId], Generation] = {}  # own block -> of its source
        self.timer: float | None = None

    # ---- from the batcher and from peers -------------------------------------------------------

    def order(self, order: TransferOrder) -> None:
        """`carry_out` comes later."""
        if isinstance(order, StartPull):
            self.orders[order.ref] = order
            self.num_here[order.ref] = order.first
            self.puller.start(order, self.world.now)
        elif isinstance(order, CancelPull):
            self.puller.cancel(order.ref)
        elif isinstance(order, PublishBlocks):
            digests = [digest(self.memory.cells[block]) for block in order.blocks]
            send = self.publisher.publish(order, digests)
            self.process.send(send.to, send.message)
        else:
            assert isinstance(order, ForgetPublished)
            self.publisher.forget(order.ref)

    def hear(self, message: Publish | AskPublish | PullOver) -> None:
        if isinstance(message, Publish):
            self.puller.publish(message, self.world.now)
        elif isinstance(message, AskPublish):
            send = self.publisher.ask(message)
            if send is not None:
                self.process.send(send.to, send.message)
        else:
            self.publisher.over(message)
        self.carry_out()

    def _tick(self) -> None:
        self.timer = None
        self.puller.tick(self.world.now)
        self.carry_out()

    def carry_out(self) -> None:
        """After orders: when all commands of one `take` are carried out."""
        self.puller.check_integrity()
        for command in self.puller.take():
            if isinstance(command, Read):
                self._begin(command)
            elif isinstance(command, CancelRead):
                self.reads[command.handle].cancelled = True
            elif isinstance(command, Send):
                self.process.send(command.to, command.message)
            else:
                if isinstance(command, Pulled):
                    self._check_pulled(command)
                self.on_news(command)
        due = self.puller.due_at()
        if due is not None and (self.timer is None or due < self.timer):
            self.timer = due
            self.world.at(max(0.0, due - self.world.now), self._tick, self.process)

    # ---- reads ---------------------------------------------------------------------------------

    def _begin(self, read: Read) -> None:
        self.process.op("read")
        pairs = [(s.source + i, s.own + i) for s in read.spans for i in range(s.count)]
        ref = self.puller._reads[read.handle]
        under_way = self.reads[read.handle] = SimRead(read, ref, pairs)
        timing, rng = self.world.timing, self.world.rng
        step = timing.delay_s * rng.random() * 2.0
        if rng.random() < timing.spike_chance:
            step += timing.spike_s * rng.random() / len(pairs)
        if read.peer[0] in self.world.scenario.slow_peers:
            step += timing.delay_s * SLOW * rng.random()
        order = list(range(len(pairs)))
        rng.shuffle(order)
        for k, i in enumerate(order):
            for half, torn in enumerate((True, False)):
                copy = partial(self._copy, under_way, i, torn)
                self.world.at(step * (k + 0.5 * half + 0.5), copy, self.process)
        self.world.at(step * (len(pairs) + 1), lambda: self._complete(under_way), self.process)

    def _copy(self, under_way: SimRead, i: int, torn: bool) -> None:
        """One block, first its first half."""
        source, own = under_way.pairs[i]
        address = self.process.address
        if self.world.opens_at(Address("worker", *under_way.read.peer), address) > self.world.now:
            return  # nothing comes from there
        if address.number not in self.watch.lost:
            self.watch.pull_write(address.number, address.epoch, under_way.ref, own)
        cells = list(self.memories[under_way.read.pool].cells[source])
        chance = self.world.scenario.transfer_faults
        if chance and not torn and self.world.rng.random() < chance:
            return  # only the first half ever comes
        size = len(cells) // 2 if torn else len(cells)
        self.memory.cells[own][:size] = cells[:size]
        if chance and self.world.rng.random() < chance:
            self.memory.cells[own][self.world.rng.randrange(size)] ^= 1 << 7

    def _complete(self, under_way: SimRead) -> None:
        """All bytes are here; generations are read now, after them."""
        self.process.op("read_done")
        read, now = under_way.read, self.world.now
        peer = self.world.processes.get(Address("worker", *read.peer))
        gone = peer is None or not peer.alive
        by_wire = not self.world.scenario.reads_outlive_source
        if by_wire and self.world.is_apart(Address("worker", *read.peer), self.process.address):
            if not under_way.cancelled and self.world.rng.random() < 0.8:
                self.world.at(0.05, lambda: self._complete(under_way), self.process)
                return
            gone = True
        if not self.world.scenario.reads_outlive_source and not gone and peer and peer.stuck:
            if not under_way.cancelled:  # its server answers no more: until its process is gone
                self.world.at(0.05, lambda: self._complete(under_way), self.process)
                return
            gone = True
        del self.reads[read.handle]
        chance = self.world.scenario.transfer_faults
        refused = {read.pool, self.memory.pool} == set(self.world.scenario.refusing or ())
        fails = bool(chance) and self.world.rng.random() < chance
        if refused and not gone:
            failed = ReadFailed(read.handle, "scripted", lost=True, refused=True)
            self.puller.read_failed(failed, now)
        elif fails or (gone and not self.world.scenario.reads_outlive_source):
            self.puller.read_failed(ReadFailed(read.handle, "scripted", lost=gone), now)
        else:
            page = self.memories[read.pool]
            generations = [page.generation(source) for source, _ in under_way.pairs]
            if chance and self.world.rng.random() < chance / 2.0:  # the block moved on meanwhile
                generations[self.world.rng.randrange(len(generations))] += 1
            digests = [digest(self.memory.cells[own]) for _, own in under_way.pairs]
            for (_, own), generation in zip(under_way.pairs, generations, strict=True):
                self.last_seen[under_way.ref, own] = generation
            self.puller.read_done(ReadDone(read.handle, generations, digests), now)
        self.carry_out()

    def _check_pulled(self, news: Pulled) -> None:
        """What counts as here from now is right."""
        order, ref, size = self.orders[news.ref], news.ref, self.memory.block_size
        client = self.process.clients.by_id[ref.request]  # type: ignore[attr-defined]
        due = client.answers[ref.choice].cells
        num_tokens = client.request.num_prompt + self._num_emitted(client, ref)
        for index in range(self.num_here[ref], news.upto):
            own = order.blocks[index - order.first]
            generation = order.generations[index - order.first]
            seen = self.last_seen[ref, own]
            check(seen == generation, "{}: block {} was read in another life", ref, own)
            cells = self.memory.cells[own][: num_tokens - index * size]
            right = due[index * size : index * size + len(cells)]
            check(cells == right, "{}: block {} was read wrong", ref, own)
        self.num_here[ref] = news.upto

    def _num_emitted(self, client: object, ref: SeqRef) -> int:
        run = self.process.batcher._lineup.get(ref)  # type: ignore[attr-defined]
        return 0 if run is None else len(run.tokens) - run.num_prompt
