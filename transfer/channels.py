"""Message channels between the processes of one host: ZeroMQ over ipc, msgpack, no pickle.

Every process binds one PULL socket named after its incarnation and connects a PUSH socket to each
peer it speaks to. Workers also have a short cut (shortcut.py) for the one message that a client's
next token waits for, the seal. Owns the sockets and the frame codec. Invariants: a send never
blocks; every queue is bounded, and a peer whose queue is full is reported, to be fenced; a frame
that does not decode is counted and dropped, it never ends a process.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import zmq

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import Address, AnyMessage, Message, Ready, Seal, Send, Stuck
from diptych.engine.core.types import Epoch
from diptych.transfer.shortcut import ShortcutInbox, ShortcutPeer

QUEUE_FRAMES_MAX: Final = 16_384
"""Frames waiting for one peer; a peer that lets so many wait is dead."""
FRAME_BYTES_MAX: Final = 256 << 20
BATCH_FRAMES_MAX: Final = 1024
"""Frames taken in one `receive`, so that a flood cannot keep a loop from its other work."""
SOCKET_PATH_MAX: Final = 107  # of the kernel, for unix sockets
SUPERVISOR: Final = Address("supervisor", 0, 1)
"""A supervisor never restarts: its run directory, and all that live in it, end with it."""

_log = logging.getLogger("diptych")


def process_name(address: Address) -> str:
    """Of a process over all its incarnations: "worker0", "scheduler0", "api0"."""
    return f"{address.kind}{address.number}"


def socket_path(run_dir: Path, address: Address) -> Path:
    return run_dir / f"{process_name(address)}.{address.epoch}"


@dataclass(slots=True)
class ChannelCounts:
    """Since the channels were opened."""

    received: int = 0
    malformed: int = 0
    dropped: int = 0  # sends refused: full queue, oversized frame, or an incarnation that is over


@dataclass(slots=True)
class _Peer:
    """The ways to one incarnation of a peer."""

    epoch: Epoch
    socket: "zmq.Socket[bytes]"
    shortcut: ShortcutPeer | None

    def close(self) -> None:
        self.socket.close(linger=0)
        if self.shortcut is not None:
            self.shortcut.close()


class Channels:
    """One process's inbox and its outgoing queues. Not thread safe; `close` when done."""

    def __init__(self, run_dir: Path, me: Address, *, queue_frames: int = QUEUE_FRAMES_MAX) -> None:
        path = socket_path(run_dir, me)
        if len(str(path)) + 2 > SOCKET_PATH_MAX:
            raise ConfigError(f"the path of a socket is too long, set a shorter TMPDIR: {path}")
        self.me = me
        self.counts = ChannelCounts()
        self._run_dir = run_dir
        self._queue_frames = queue_frames
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._stuck: set[Address] = set()  # reported to the supervisor
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
        self._context = zmq.Context()
        self.inbox: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self.inbox.setsockopt(zmq.LINGER, 0)
        self.inbox.setsockopt(zmq.RCVHWM, queue_frames)
        self.inbox.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        self.inbox.bind(f"ipc://{path}")
        self._shortcut = ShortcutInbox(path) if me.kind == "worker" else None
        self._watched: dict[int, bool] = {}
        self._poller = zmq.Poller()
        self._poller.register(self.inbox, zmq.POLLIN)
        if self._shortcut is not None:
            self._poller.register(self._shortcut.fileno(), zmq.POLLIN)

    def fileno(self) -> int:
        """Readable when frames may have come; edge triggered: `receive` until it returns none."""
        return int(self.inbox.getsockopt(zmq.FD))

    def watch(self, fds: dict[int, bool]) -> None:
        """`receive` also ends when one of these is readable (True: or writable)."""
        if fds == self._watched:
            return
        for fd in self._watched.keys() - fds.keys():
            self._poller.unregister(fd)
        for fd, write in fds.items():
            self._poller.register(fd, zmq.POLLIN | (zmq.POLLOUT if write else 0))
        self._watched = dict(fds)

    def send(self, send: Send) -> bool:
        """Queues the message. False: the peer is dead or gone, and the message is lost."""
        frame = self._encoder.encode(send.message)
        peer = self._peer(send.to)
        if peer is None or len(frame) > FRAME_BYTES_MAX:
            return self._drop(send, "its incarnation is over" if peer is None else "too large")
        if peer.shortcut is not None and isinstance(send.message, Seal):
            if peer.shortcut.send(frame):
                return True
        try:
            peer.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self._report_stuck(send.to)
            return self._drop(send, "the peer's queue is full")
        return True

    def send_to(self, to: Address, message: Message) -> bool:
        return self.send(Send(to, message))

    def announce(self) -> None:
        """Tells the supervisor that this process listens."""
        self.send_to(SUPERVISOR, Ready(process_name(self.me), self.me.epoch))

    def receive(self, timeout_s: float | None) -> list[AnyMessage]:
        """Waits for a message (None: for ever), then takes all that wait, at most 1,024."""
        timeout_ms = None if timeout_s is None else math.ceil(timeout_s * 1000)
        messages: list[AnyMessage] = []
        for source, _ in self._poller.poll(timeout_ms):
            if source is self.inbox:
                self._drain_inbox(messages)
            elif source not in self._watched:
                self._drain_shortcut(messages)
        return messages

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        if self._shortcut is not None:
            self._shortcut.close()
        self.inbox.close(linger=0)
        self._context.term()
        socket_path(self._run_dir, self.me).unlink(missing_ok=True)

    def _drain_inbox(self, messages: list[AnyMessage]) -> None:
        """Asks before it takes: an exception for an empty queue would cost more than a message."""
        for _ in range(BATCH_FRAMES_MAX):
            if not int(self.inbox.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._decode(self.inbox.recv(zmq.NOBLOCK), messages)

    def _drain_shortcut(self, messages: list[AnyMessage]) -> None:
        assert self._shortcut is not None
        while (frame := self._shortcut.receive()) is not None:
            self._decode(frame, messages)

    def _decode(self, frame: bytes | memoryview, messages: list[AnyMessage]) -> None:
        self.counts.received += 1
        try:
            messages.append(self._decoder.decode(frame))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.counts.malformed += 1
            _log.error("dropped a malformed frame of %d bytes: %s", len(frame), error)

    def _peer(self, to: Address) -> "_Peer | None":
        """None: this incarnation is over, a newer one is known."""
        known = self._peers.get((to.kind, to.number))
        if known is not None:
            if known.epoch == to.epoch:
                return known
            if known.epoch > to.epoch:
                return None
            known.close()
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, self._queue_frames)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)  # ms
        inbox = socket_path(self._run_dir, to)
        socket.connect(f"ipc://{inbox}")
        between_workers = self.me.kind == to.kind == "worker"
        peer = _Peer(to.epoch, socket, ShortcutPeer(inbox) if between_workers else None)
        self._peers[to.kind, to.number] = peer
        return peer

    def _report_stuck(self, peer: Address) -> None:
        """Once per incarnation: only its end makes good what it has missed."""
        if peer.kind != "supervisor" and peer not in self._stuck:
            self._stuck.add(peer)
            self.send_to(SUPERVISOR, Stuck(peer))

    def _drop(self, send: Send, reason: str) -> bool:
        self.counts.dropped += 1
        if self.counts.dropped.bit_count() == 1:  # the 1st, 2nd, 4th ...: a log that cannot flood
            kind = type(send.message).__name__
            to = f"{process_name(send.to)}.{send.to.epoch}"
            _log.warning("%s to %s lost, %s (%d so far)", kind, to, reason, self.counts.dropped)
        return False


class AsyncChannels:
    """The same for an asyncio event loop: messages are given to `on_message`, in order.

    Made and closed inside the running loop. An exception of `on_message` reaches the loop's
    exception handler.
    """

    def __init__(
        self, run_dir: Path, me: Address, on_message: Callable[[AnyMessage], None]
    ) -> None:
        self.channels = Channels(run_dir, me)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._loop.add_reader(self.channels.fileno(), self._readable)
        self._loop.call_soon(self._readable)  # what came before the reader was there

    def send(self, send: Send) -> bool:
        return self.channels.send(send)

    def announce(self) -> None:
        self.channels.announce()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self.channels.fileno())
            self.channels.close()

    def _readable(self) -> None:
        if self._closed:
            return
        messages = self.channels.receive(0)
        if messages:  # the descriptor tells of an edge once: come back until nothing is left
            self._loop.call_soon(self._readable)
        for message in messages:
            if not self._closed:
                self._on_message(message)
