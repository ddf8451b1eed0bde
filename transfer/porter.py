"""Carries out what the pull and publish machines of one worker decide, between its steps.

Owns the two machines, the backends and which of them reaches which pool. It never waits: `turn`
does what can be done now, and `fds` and `due_s` say when there is more. Invariant: the batcher
hears of blocks only through `on_news`, in the order in which they became true.
"""

import logging
import time
from collections.abc import Callable, Mapping

from diptych.engine.core.handoff import (
    CancelPull,
    PublishBlocks,
    Pulled,
    PullEnded,
    StartPull,
    TransferNews,
    TransferOrder,
)
from diptych.engine.core.messages import Address, AskPublish, Publish, PullOver, Send
from diptych.engine.core.types import PoolId
from diptych.transfer.backend import Backend
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.publish import Publisher
from diptych.transfer.pull import Puller, read_blocks
from diptych.transfer.spans import CancelRead, Read, ReadDone

PeerMessage = Publish | AskPublish | PullOver

_log = logging.getLogger("diptych")


class Porter:
    """`routes`: the backend for each pool of this host; `elsewhere`: for those of other hosts;
    `endpoint`: where the own pool is served."""

    def __init__(
        self,
        me: Address,
        own: PoolMemory,
        routes: Mapping[PoolId, Backend],
        endpoint: str,
        send: Callable[[Send], object],
        on_news: Callable[[TransferNews], None],
        clock: Callable[[], float] = time.monotonic,
        elsewhere: Backend | None = None,
    ) -> None:
        self._own = own
        self._routes = routes
        self._elsewhere = elsewhere
        found = [*routes.values(), *([] if elsewhere is None else [elsewhere])]
        self._backends = list({id(backend): backend for backend in found}.values())
        self._send = send
        self._on_news = on_news
        self._clock = clock
        self._puller = Puller(me.number, me.epoch, read_blocks(own.block_bytes))
        self._publisher = Publisher(me.number, me.epoch, endpoint)
        self._reading: dict[int, Backend] = {}

    def order(self, order: TransferOrder) -> None:
        """Of the batcher."""
        if isinstance(order, StartPull):
            self._puller.start(order, self._clock())
        elif isinstance(order, CancelPull):
            self._puller.cancel(order.ref)
        elif isinstance(order, PublishBlocks):
            digests = self._own.digests(order.blocks) if order.blocks else []
            self._send(self._publisher.publish(order, digests))
        else:
            self._publisher.forget(order.ref)

    def hear(self, message: PeerMessage) -> None:
        """Of another worker."""
        if isinstance(message, Publish):
            self._puller.publish(message, self._clock())
        elif isinstance(message, AskPublish):
            send = self._publisher.ask(message)
            if send is not None:
                self._send(send)
        else:
            self._publisher.over(message)

    def turn(self) -> None:
        """Moves a bounded number of bytes and passes on what is new."""
        self._puller.tick(self._clock())
        self._carry_out()
        for backend in self._backends:
            for answer in backend.poll():
                del self._reading[answer.handle]
                if isinstance(answer, ReadDone):
                    self._puller.read_done(answer, self._clock())
                else:
                    level = logging.ERROR if answer.refused else logging.INFO
                    _log.log(level, "a read over %s ended: %s", backend.name, answer.reason)
                    self._puller.read_failed(answer, self._clock())
        self._carry_out()

    def due_s(self, most_s: float) -> float:
        """Seconds until `turn` has something to do, if no descriptor becomes ready before."""
        if any(backend.eager for backend in self._backends):
            return 0.0
        due_at = self._puller.due_at()
        return most_s if due_at is None else min(most_s, max(0.0, due_at - self._clock()))

    def fds(self) -> dict[int, bool]:
        """As of `Backend.fds`, of all backends."""
        return {fd: write for backend in self._backends for fd, write in backend.fds().items()}

    def close(self) -> None:
        for backend in self._backends:
            backend.close()

    def _carry_out(self) -> None:
        for command in self._puller.take():
            if isinstance(command, Read):
                backend = self._routes.get(command.pool, self._elsewhere)
                assert backend is not None, "a pool that nobody knows"
                self._reading[command.handle] = backend
                backend.read(command)
            elif isinstance(command, CancelRead):
                self._reading[command.handle].cancel(command.handle)
            elif isinstance(command, Send):
                self._send(command)
            else:
                assert isinstance(command, Pulled | PullEnded)
                self._on_news(command)
