"""The source's half of a handoff between memory domains: what is final, and its digests. Pure.

Owns the digests of every sequence that a peer may still read, so that a lost message can be
repeated. Invariants: a message holds all that was published before (cumulative); the table is
bounded, and an entry that falls out costs its reader an attempt, never a wrong block.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from diptych.engine.core.handoff import PublishBlocks
from diptych.engine.core.messages import Address, AskPublish, Publish, PullOver, Send
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import Epoch, WorkerId

RECORDS_MAX: Final = 1024
"""Sequences remembered, the oldest go first: far more than one worker has under way. One whose
reader died or gave up before it was published in full stays until then."""


@dataclass(slots=True)
class _Record:
    scheduler_epoch: Epoch
    peer: tuple[WorkerId, Epoch]
    first: int
    digests: list[int] = field(default_factory=list)


class Publisher:
    def __init__(self, worker: WorkerId, worker_epoch: Epoch, endpoint: str) -> None:
        self._worker = worker
        self._worker_epoch = worker_epoch
        self._endpoint = endpoint
        self._records: OrderedDict[SeqRef, _Record] = OrderedDict()
        self._epoch: Epoch = 0  # the newest scheduler's

    def __len__(self) -> int:
        return len(self._records)

    def publish(self, order: PublishBlocks, digests: list[int]) -> Send:
        """More blocks of a sequence are final; `digests` are those of `order.blocks`."""
        assert len(digests) == len(order.blocks)
        if order.scheduler_epoch > self._epoch:  # what an older scheduler ordered is over
            self._epoch = order.scheduler_epoch
            self._records.clear()
        record = self._records.get(order.ref)
        if record is None:
            record = _Record(order.scheduler_epoch, order.peer, order.first)
            self._records[order.ref] = record
            if len(self._records) > RECORDS_MAX:
                self._records.popitem(last=False)
        assert order.first == record.first + len(record.digests), "published in order"
        record.digests += digests
        return self._message(order.ref, record)

    def ask(self, message: AskPublish) -> Send | None:
        """A reader heard nothing for a while. None: there is nothing to say yet, or any more."""
        record = self._known(message)
        return None if record is None else self._message(message.ref, record)

    def over(self, message: PullOver) -> None:
        if self._known(message) is not None:
            del self._records[message.ref]

    def forget(self, ref: SeqRef) -> None:
        self._records.pop(ref, None)

    def _known(self, message: AskPublish | PullOver) -> _Record | None:
        record = self._records.get(message.ref)
        if record is None or message.peer_epoch != self._worker_epoch:
            return None
        return record if record.peer == (message.worker, message.worker_epoch) else None

    def _message(self, ref: SeqRef, record: _Record) -> Send:
        peer, peer_epoch = record.peer
        message = Publish(
            scheduler_epoch=record.scheduler_epoch,
            worker=self._worker,
            worker_epoch=self._worker_epoch,
            peer_epoch=peer_epoch,
            ref=ref,
            first=record.first,
            digests=list(record.digests),
            endpoint=self._endpoint,
        )
        return Send(Address("worker", peer, peer_epoch), message)
