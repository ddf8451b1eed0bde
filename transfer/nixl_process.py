"""The NIXL process of one worker: reads from the peers' pools, and lets them read the own one.

A child of its worker and in its process group: what crashes in UCX ends this process, not the
engine. Owns the peers and every read under way. Invariant: a read is answered only when its
transfer is over, and its generations were read after its data.
"""

import logging
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec

from diptych.transfer.nixl_agent import SCRATCH_PAGES, Agent, RemotePool, end_process, words
from diptych.transfer.nixl_batch import Batch
from diptych.transfer.nixl_wire import (
    ALIVE_S,
    PACKET_BYTES_MAX,
    STALL_S_MAX,
    NixlAnswer,
    NixlBoot,
    NixlCancel,
    NixlCard,
    NixlDone,
    NixlFailed,
    NixlOrder,
    NixlRead,
    NixlUp,
    ring,
    still,
)
from diptych.transfer.processes import die_with_parent, name_process
from diptych.transfer.tcp_wire import (
    ACCEPTED,
    HELLO_S_MAX,
    NONCE_BYTES,
    REFUSALS,
    prove,
    receive,
    serve_hello,
)

_POLL_S: Final = 0.0001  # between two looks at transfers under way
_BATCH_BYTES_MAX: Final = 8 << 20  # of which the generations are read together
_CARD_BYTES_MAX: Final = 1 << 20

_log = logging.getLogger("diptych")


class NoCard(Exception):
    """A peer that does not say how to read it; `lost`, `refused`: nor ever will."""

    def __init__(self, reason: str, lost: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost or refused
        self.refused = refused


@dataclass(slots=True)
class Peer:
    """`pool` None: it is being asked for its card."""

    endpoint: str
    waiting: deque[NixlRead] = field(default_factory=deque)
    pool: RemotePool | None = None

    def next_batch(self, block_bytes: int) -> list[NixlRead]:
        """Reads that wait, at most `_BATCH_BYTES_MAX` of them, or one."""
        waiting, batch, num_bytes = self.waiting, [self.waiting.popleft()], 0
        while waiting:
            num_bytes += len(batch[-1].own) // 4 * block_bytes
            if num_bytes >= _BATCH_BYTES_MAX:
                break
            batch.append(waiting.popleft())
        return batch


class NixlProcess:
    def __init__(self, boot: NixlBoot) -> None:
        self._boot = boot
        self._control = socket.socket(fileno=boot.control_fd)
        self._key, self._layout = bytes.fromhex(boot.key), bytes.fromhex(boot.layout)
        self._peer_layout = bytes.fromhex(boot.peer_layout)
        self._agent = Agent(boot)
        self._peers: dict[str, Peer] = {}
        self._ready: deque[Peer] = deque()  # whose pool is known, and reads of it wait
        self._running: list[tuple[Peer, Batch]] = []
        self._free_pages = list(range(SCRATCH_PAGES))
        self._cards: deque[tuple[Peer, NixlCard | NoCard]] = deque()  # from the asking threads
        self._said_s = time.monotonic()
        self._bell = boot.order_bell_fd  # rung by the asking threads, too

    def run(self) -> None:
        """Until the worker's end of the control socket is gone."""
        threading.Thread(target=self._hand_out_cards, daemon=True).start()
        self._say(NixlUp())
        while True:
            if not self._ready:
                select.select([self._bell], [], [], _POLL_S if self._running else ALIVE_S)
            still(self._bell)
            if not self._take_orders():
                return
            while self._cards:
                self._take_card(*self._cards.popleft())
            if self._ready:
                self._begin(self._ready[0])
            self._look()
            if time.monotonic() - self._said_s >= ALIVE_S:
                self._say(NixlUp())

    # ---- orders

    def _take_orders(self) -> bool:
        """All that wait. False: the worker is gone."""
        with suppress(BlockingIOError):
            while packet := self._control.recv(PACKET_BYTES_MAX, socket.MSG_DONTWAIT):
                order = msgspec.msgpack.decode(packet, type=NixlOrder)
                if isinstance(order, NixlRead):
                    self._read(order)
                else:
                    self._cancel(order)
            return False
        return True

    def _read(self, read: NixlRead) -> None:
        peer = self._peers.get(read.endpoint)
        if peer is None:
            peer = self._peers[read.endpoint] = Peer(read.endpoint)
            threading.Thread(target=self._ask, args=(peer,), daemon=True).start()
        peer.waiting.append(read)
        if peer.pool is not None and peer not in self._ready:
            self._ready.append(peer)

    def _cancel(self, order: NixlCancel) -> None:
        handle = order.cancel.handle
        for _, batch in self._running:  # answered when it is over
            batch.num_cancelled += any(read.handle == handle for read in batch.reads)
        for peer in self._peers.values():
            for read in list(peer.waiting):
                if read.handle == handle:
                    peer.waiting.remove(read)
                    self._say(NixlFailed(handle, "cancelled"))

    def _begin(self, peer: Peer) -> None:
        """A part of what waits for this peer; the others' turn is next."""
        self._ready.popleft()
        if not peer.waiting:
            return
        assert peer.pool is not None
        batch = Batch(self._agent, peer.pool, peer.next_batch(self._boot.into_block_bytes))
        self._running.append((peer, batch))
        if peer.waiting:
            self._ready.append(peer)
        batch.move()

    # ---- transfers

    def _look(self) -> None:
        for peer, batch in list(self._running):
            answers = self._answers(batch)
            if answers:
                self._running.remove((peer, batch))
                batch.free(self._free_pages)
                if batch.failure is not None:
                    self._drop(peer, batch.failure)
                for answer in answers:
                    self._say(answer)
            elif time.monotonic() - batch.since_s > STALL_S_MAX:
                end_process("a transfer stands still")

    def _answers(self, batch: Batch) -> list[NixlDone] | list[NixlFailed]:
        """To its reads; none while something is under way."""
        if batch.look(self._say):
            return []
        if batch.failure is None and not batch.asked:
            if batch.num_cancelled == len(batch.reads):
                return [NixlFailed(read.handle, "cancelled") for read in batch.reads]
            if not batch.ask_generations(self._free_pages):
                return []  # other batches will give theirs back
        generations = None if batch.failure is not None else batch.generations()
        if generations is not None:
            return [NixlDone([read.handle for read in batch.reads], generations)]
        if batch.failure is not None:
            reason = words(batch.failure)
            return [NixlFailed(read.handle, reason) for read in batch.reads]
        return []

    def _drop(self, peer: Peer, error: Exception) -> None:
        """The next read asks for the card of whoever listens there then."""
        if self._peers.get(peer.endpoint) is peer:
            del self._peers[peer.endpoint]
            _log.info("peer %s is gone: %s", peer.endpoint, words(error))
            if peer.pool is not None:
                peer.pool.forget()
            for read in peer.waiting:
                self._say(NixlFailed(read.handle, words(error)))
            peer.waiting.clear()

    # ---- cards

    def _take_card(self, peer: Peer, card: NixlCard | NoCard) -> None:
        if isinstance(card, NixlCard):
            try:
                peer.pool = RemotePool(self._agent, card)
                self._ready.append(peer)
                return
            except Exception as error:  # whatever NIXL raises
                card = NoCard(words(error))
        del self._peers[peer.endpoint]
        for read in peer.waiting:
            self._say(NixlFailed(read.handle, str(card), card.lost, card.refused))

    def _ask(self, peer: Peer) -> None:
        """In a thread of its own: nobody waits for a peer that does not answer."""
        try:
            self._cards.append((peer, self._fetch_card(peer.endpoint)))
        except (OSError, EOFError, msgspec.DecodeError) as error:
            self._cards.append((peer, NoCard(f"{peer.endpoint}: {words(error)}")))
        except NoCard as error:
            self._cards.append((peer, error))
        ring(self._bell)

    def _fetch_card(self, endpoint: str) -> NixlCard:
        host, _, port = endpoint.rpartition(":")
        with socket.create_connection((host, int(port)), HELLO_S_MAX) as connection:
            nonce = receive(connection, NONCE_BYTES)
            hello = prove(self._key, nonce, self._peer_layout) + self._peer_layout
            connection.sendall(hello)
            answer = receive(connection, 1)[0]
            if answer != ACCEPTED:
                reason = REFUSALS.get(answer, "it speaks another protocol")
                raise NoCard(f"refused: {reason}", refused=True)
            size = int.from_bytes(receive(connection, 4), "little")
            if size > _CARD_BYTES_MAX:
                raise NoCard("it speaks another protocol", lost=True)
            return msgspec.msgpack.decode(receive(connection, size), type=NixlCard)

    def _hand_out_cards(self) -> None:
        listener = socket.socket(fileno=self._boot.listen_fd)
        listener.settimeout(None)
        card = msgspec.msgpack.encode(self._agent.card)
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError, EOFError):
                connection.settimeout(HELLO_S_MAX)
                if serve_hello(connection, self._key, self._layout):
                    connection.sendall(len(card).to_bytes(4, "little") + card)

    def _say(self, answer: NixlAnswer) -> None:
        self._said_s = time.monotonic()
        self._control.sendall(msgspec.msgpack.encode(answer))
        ring(self._boot.answer_bell_fd)


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="nixl %(message)s")
    boot = msgspec.json.decode(sys.stdin.buffer.read(), type=NixlBoot)
    die_with_parent(boot.worker_pid)
    name_process("nixl")
    with suppress(BrokenPipeError, ConnectionResetError):  # the worker ended
        NixlProcess(boot).run()
    os._exit(0)  # no destructor of UCX's may hang on a peer


if __name__ == "__main__":
    main()
