"""The reader's half of a handoff between memory domains: what to read when, what to believe. Pure.

Owns every pull of one worker from `StartPull` to `PullEnded`. Invariants: a block counts as here
only when its source still had the assigned generation after the read and its digest is the
published one; what fails either test is read again, or ends the pull, never kept; a pull ends only
when none of its reads is under way, so that nothing writes into blocks that were given back.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from diptych.engine.core.handoff import Pulled, PullEnded, StartPull
from diptych.engine.core.messages import Address, AskPublish, Publish, PullOver, Refused, Send
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Epoch, WorkerId
from diptych.transfer.spans import CancelRead, Read, ReadDone, ReadFailed, coalesce

ASK_S: Final = 0.05
"""Silence after which the peer is asked to publish again; doubles up to the next."""
ASK_S_MAX: Final = 1.0
READ_BLOCKS_MAX: Final = 64
"""Blocks of one read, unless the shell knows better: see `read_blocks`."""
READ_BYTES_MAX: Final = 4 << 20
"""Bytes of one read: enough to make a round trip cheap, few enough that a cancel is quick."""
READS_MAX: Final = 2
"""Reads of one pull under way at once: one moves, the next is ready behind it."""
BAD_MAX: Final = 4
"""Failed reads and bad blocks after which the source is given up."""
EARLY_MAX: Final = 4096

PullCommand = Read | CancelRead | Send | Pulled | PullEnded


@dataclass(slots=True)
class _Pull:
    order: StartPull
    endpoint: str = ""
    digests: list[int] = field(default_factory=list)  # of the blocks published so far
    verified: list[bool] = field(default_factory=list)  # by block
    waiting: list[int] = field(default_factory=list)  # published, to be read, ascending
    reads: dict[int, list[int]] = field(default_factory=dict)  # handle -> blocks
    num_here: int = 0  # verified, a prefix
    num_bad: int = 0
    ended: bool = False  # cancelled or given up: only its reads are awaited
    refused: list[Refused] = field(default_factory=list)  # by the source, at most once
    ask_s: float = ASK_S
    ask_at: float = 0.0
    read_at: float = 0.0  # not before, after a failure
    busy_since: float = 0.0
    read_s: float = 0.0


def read_blocks(block_bytes: int) -> int:
    """Blocks of one read."""
    return min(max(READ_BYTES_MAX // block_bytes, 8), 256)


class Puller:
    def __init__(
        self, worker: WorkerId, worker_epoch: Epoch, read_blocks_max: int = READ_BLOCKS_MAX
    ) -> None:
        self._read_blocks_max = read_blocks_max
        self._worker = worker
        self._worker_epoch = worker_epoch
        self._pulls: dict[SeqRef, _Pull] = {}
        self._early: OrderedDict[SeqRef, Publish] = OrderedDict()
        self._reads: dict[int, SeqRef] = {}
        self._handle = 0
        self._commands: list[PullCommand] = []

    def __len__(self) -> int:
        return len(self._pulls)

    # ---- orders and messages -------------------------------------------------------------------

    def start(self, order: StartPull, now: float) -> None:
        assert order.ref not in self._pulls
        pull = _Pull(order, verified=[False] * len(order.blocks), ask_at=now + ASK_S)
        self._pulls[order.ref] = pull
        early = self._early.pop(order.ref, None)
        if early is not None:
            self._take(pull, early, now)

    def publish(self, message: Publish, now: float) -> None:
        """May come before its order, twice, or out of turn."""
        if message.peer_epoch != self._worker_epoch:
            return
        pull = self._pulls.get(message.ref)
        if pull is not None:
            self._take(pull, message, now)
            return
        held = self._early.get(message.ref)
        if held is None or len(held.digests) < len(message.digests):
            self._early[message.ref] = message
            if len(self._early) > EARLY_MAX:
                self._early.popitem(last=False)

    def cancel(self, ref: SeqRef) -> None:
        """Local and immediate: no read begins any more."""
        pull = self._pulls.get(ref)
        if pull is not None and not pull.ended:
            self._end(pull)

    def _take(self, pull: _Pull, message: Publish, now: float) -> None:
        order = pull.order
        sender = (message.worker, message.worker_epoch)
        if sender != order.peer or message.scheduler_epoch != order.scheduler_epoch:
            return
        if pull.ended or message.first != order.first:
            return
        pull.ask_s, pull.ask_at = ASK_S, now + ASK_S
        known = len(pull.digests)
        fresh = message.digests[known : len(order.blocks)]
        if not fresh:
            return
        pull.endpoint = message.endpoint
        pull.digests += fresh
        pull.waiting += range(known, len(pull.digests))
        self._read_on(pull, now)

    # ---- reads ---------------------------------------------------------------------------------

    def _read_on(self, pull: _Pull, now: float) -> None:
        """Begins what may begin: spans of published blocks that are not here."""
        while pull.waiting and len(pull.reads) < READS_MAX and now >= pull.read_at:
            batch = pull.waiting[: self._read_blocks_max]
            del pull.waiting[: len(batch)]
            if not pull.reads:
                pull.busy_since = now
            self._handle += 1
            pull.reads[self._handle] = batch
            self._reads[self._handle] = pull.order.ref
            order = pull.order
            spans = coalesce([order.source[i] for i in batch], [order.blocks[i] for i in batch])
            read = Read(self._handle, order.peer, order.pool, pull.endpoint, spans)
            self._commands.append(read)

    def read_done(self, done: ReadDone, now: float) -> None:
        pull, blocks = self._drained(done.handle, now)
        if pull.ended:
            self._finish_end(pull)
            return
        assert len(done.generations) == len(done.digests) == len(blocks)
        for i, generation, digest in zip(blocks, done.generations, done.digests, strict=True):
            if generation != pull.order.generations[i]:
                self._end(pull)  # the block has another life: it will never be ours again
                return
            if digest == pull.digests[i]:
                pull.verified[i] = True
            else:
                pull.num_bad += 1
                pull.waiting.append(i)
        if pull.num_bad > BAD_MAX:
            self._end(pull)
            return
        pull.waiting.sort()
        before = pull.num_here
        while pull.num_here < len(pull.verified) and pull.verified[pull.num_here]:
            pull.num_here += 1
        if pull.num_here > before:
            self._commands.append(Pulled(pull.order.ref, pull.order.first + pull.num_here))
        if pull.num_here == len(pull.verified):
            self._close(pull, complete=True)
            return
        self._read_on(pull, now)

    def read_failed(self, failed: ReadFailed, now: float) -> None:
        pull, blocks = self._drained(failed.handle, now)
        if not pull.ended:
            if failed.refused and not pull.refused:
                pull.refused.append(Refused(pull.order.pool, pull.order.peer, failed.reason))
            pull.num_bad += 1
            pull.waiting = sorted(pull.waiting + blocks)
            pull.read_at = now + ASK_S
        if pull.ended:
            self._finish_end(pull)
        elif failed.lost or failed.refused or pull.num_bad > BAD_MAX:
            self._end(pull)

    def _drained(self, handle: int, now: float) -> tuple[_Pull, list[int]]:
        pull = self._pulls[self._reads.pop(handle)]
        blocks = pull.reads.pop(handle)
        if not pull.reads:
            pull.read_s += now - pull.busy_since
        return pull, blocks

    # ---- ends ----------------------------------------------------------------------------------

    def _end(self, pull: _Pull) -> None:
        pull.ended = True
        pull.waiting = []
        for handle in pull.reads:
            self._commands.append(CancelRead(handle))
        self._finish_end(pull)

    def _finish_end(self, pull: _Pull) -> None:
        if not pull.reads:
            self._close(pull, complete=False)

    def _close(self, pull: _Pull, complete: bool) -> None:
        order = pull.order
        del self._pulls[order.ref]
        peer, peer_epoch = order.peer
        over = PullOver(
            order.scheduler_epoch, self._worker, self._worker_epoch, peer_epoch, order.ref
        )
        self._commands.append(Send(Address("worker", peer, peer_epoch), over))
        num_blocks = sum(pull.verified)
        ended = PullEnded(order.ref, complete, num_blocks, pull.read_s, pull.refused)
        self._commands.append(ended)

    # ---- time ----------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Asks where it was silent too long, reads again what failed a while ago."""
        for pull in self._pulls.values():
            if pull.ended:
                continue
            self._read_on(pull, now)
            if len(pull.digests) == len(pull.verified) or now < pull.ask_at:
                continue
            order = pull.order
            peer, peer_epoch = order.peer
            ask = AskPublish(
                order.scheduler_epoch, self._worker, self._worker_epoch, peer_epoch, order.ref
            )
            self._commands.append(Send(Address("worker", peer, peer_epoch), ask))
            pull.ask_s = min(pull.ask_s * 2.0, ASK_S_MAX)
            pull.ask_at = now + pull.ask_s

    def due_at(self) -> float | None:
        """When `tick` has something to do next, if nothing else happens; None: never."""
        due: float | None = None
        for pull in self._pulls.values():
            if pull.ended:
                continue
            for at, wanted in (
                (pull.ask_at, len(pull.digests) < len(pull.verified)),
                (pull.read_at, bool(pull.waiting) and not pull.reads),
            ):
                if wanted and (due is None or at < due):
                    due = at
        return due

    def take(self) -> list[PullCommand]:
        """What the shell has to do now, in this order."""
        commands, self._commands = self._commands, []
        return commands

    def check_integrity(self) -> None:
        """Assert what must hold between calls. For tests."""
        handles: set[int] = set()
        for ref, pull in self._pulls.items():
            assert pull.order.ref == ref
            assert not pull.ended or pull.reads, "an ended pull only waits for its reads"
            under_way = [i for blocks in pull.reads.values() for i in blocks]
            places = [*pull.waiting, *under_way]
            places += [i for i, here in enumerate(pull.verified) if here]
            assert pull.ended or sorted(places) == list(range(len(pull.digests)))
            assert all(pull.verified[: pull.num_here])
            handles |= pull.reads.keys()
        assert handles == self._reads.keys()
