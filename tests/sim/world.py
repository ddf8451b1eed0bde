"""Virtual time, the network and the life of processes.

Owns the event heap, every link between two incarnations and every random number of a run. A link
is FIFO, as ZeroMQ over ipc is (a seal may take a short cut past it); a message to a dead
incarnation is lost, and a kill may lose what the dead one had sent last. Invariant: nothing here
reads a clock or a global random state.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Final

import msgspec

from diptych.engine.core.messages import (
    Address,
    AnyMessage,
    AskPublish,
    Message,
    Publish,
    PullOver,
    Seal,
    TokenBatch,
)
from diptych.engine.core.types import DownCause
from tests.sim.scenario import Scenario

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(AnyMessage)
_ABOUT_BLOCKS: Final = (Publish, AskPublish, PullOver)
HAUNTS: Final = 8
"""Messages of a fenced worker that turn up again."""
TRACE_KEPT: Final = 400


class Violation(AssertionError):
    """An invariant does not hold; `kind` is its text without this run's values."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Crashed(Exception):
    """A fault of the scenario ends the running process here."""


def check(condition: object, text: str, *values: object) -> None:
    if not condition:
        raise Violation(text, text.format(*values))


@dataclass(slots=True)
class Process:
    """One incarnation. Its shell reacts in `receive`; `op` marks every place where it may die."""

    world: "World"
    address: Address
    slot: str
    alive: bool = True
    stuck: bool = False  # hung: does nothing, but is not gone
    cause: DownCause = DownCause.KILLED

    def receive(self, message: Message) -> None:
        raise NotImplementedError

    def died(self) -> None:
        """Called once, at death."""

    def op(self, label: str) -> None:
        """One place where this process may be killed."""
        world = self.world
        if world.fault_slots and self.slot in world.fault_slots:
            world.count(self.slot, label)

    def send(self, to: Address, message: Message) -> None:
        self.op("send")
        self.world.transmit(self.address, to, message)
        self.op(f"sent_{type(message).__name__}")


@dataclass(slots=True)
class Link:
    rng: Random
    source: Address
    last: float = 0.0
    broken: bool = False  # nothing on it arrives any more
    queue: deque[bytes] = field(default_factory=deque)


class World:
    """See the module docstring."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.timing = scenario.timing
        self.rng = Random(f"world-{scenario.seed}")
        self.now = 0.0
        self.num_events = 0
        self.processes: dict[Address, Process] = {}
        self.links: dict[tuple[Address, Address], Link] = {}
        self.trace: deque[tuple[float, str, object]] = deque(maxlen=TRACE_KEPT)
        self.on_death: Callable[[Process], None] = lambda process: None
        self.on_hang: Callable[[Process], None] = lambda process: None
        self.opens_at: Callable[[Address, Address], float] = lambda source, to: 0.0
        self.last_fault = 0.0
        self.sent: dict[Address, deque[tuple[Address, bytes]]] = {}  # by workers, the last few
        self.fault_slots = {fault.slot for fault in scenario.faults}
        self._faults: dict[tuple[str, str], set[int]] = {}
        for fault in scenario.faults:
            self._faults.setdefault((fault.slot, fault.label), set()).add(fault.nth)
        self._counts: dict[tuple[str, str], int] = {}
        self._heap: list[tuple[float, int, Process | None, Callable[[], None]]] = []
        self._serial = 0

    # ---- time ----------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None], process: Process | None = None) -> None:
        """Runs `action` after `delay`, unless `process` is dead by then."""
        self._serial += 1
        heapq.heappush(self._heap, (self.now + delay, self._serial, process, action))

    def run_one(self) -> None:
        """The next event; a `Crashed` inside ends the process that the event belongs to."""
        self.now, _, process, action = heapq.heappop(self._heap)
        self.num_events += 1
        if process is None:
            action()
            return
        if not process.alive or process.stuck:
            return
        try:
            action()
        except Crashed:
            self.kill(process)

    def note(self, what: str, value: object = None) -> None:
        self.trace.append((self.now, what, value))

    # ---- life ----------------------------------------------------------------------------------

    def kill(self, process: Process) -> None:
        if not process.alive:
            return
        self.note(f"{process.slot}.{process.address.epoch} dies ({process.cause})")
        self.last_fault = self.now
        process.alive = False
        for (source, _), link in self.links.items():
            if source == process.address and link.queue and self.rng.random() < 0.6:
                for _ in range(self.rng.randint(0, len(link.queue))):
                    link.queue.pop()  # still in its own send buffer
        process.died()
        self.on_death(process)

    def leave(self, process: Process) -> None:
        """It exits by itself: what it sent arrives."""
        self.note(f"{process.slot}.{process.address.epoch} leaves")
        process.alive = False
        process.died()
        self.on_death(process)

    def count(self, slot: str, label: str) -> None:
        """Counts one operation; raises where the scenario wants a death."""
        crash = False
        for name in (label, "any"):
            key = (slot, name)
            if key in self._faults:
                self._counts[key] = count = self._counts.get(key, 0) + 1
                crash = crash or count in self._faults[key]
        if crash and label != "stepping":
            raise Crashed

    def hangs(self, slot: str) -> bool:
        """Whether the scenario wants the step that begins now to hang."""
        key = (slot, "stepping")
        if key not in self._faults:
            return False
        self._counts[key] = count = self._counts.get(key, 0) + 1
        return count in self._faults[key]

    # ---- network -------------------------------------------------------------------------------

    def transmit(self, source: Address, to: Address, message: Message) -> None:
        """Puts a message on the wire as bytes, so that nothing is shared by reference."""
        self.note(
            f"{source.kind}{source.number}.{source.epoch} -> {to.kind}{to.number}.{to.epoch}",
            message,
        )
        key = (source, to)
        link = self.links.get(key)
        if link is None:
            link = self.links[key] = Link(Random(f"{self.scenario.seed}-{source}-{to}"), source)
        timing = self.timing
        delay = link.rng.random() * 2.0 * timing.delay_s
        if link.rng.random() < timing.spike_chance:
            delay += link.rng.random() * timing.spike_s
        if self._drops(link, message):
            return
        if self.scenario.zombies and source.kind == "worker":
            sent = self.sent.setdefault(source, deque(maxlen=HAUNTS))
            sent.append((to, _ENCODER.encode(message)))
        if isinstance(message, _ABOUT_BLOCKS) and self.is_cut(source, to):
            return
        if isinstance(message, _ABOUT_BLOCKS) and self.scenario.transfer_loss:
            fate = link.rng.random() / self.scenario.transfer_loss
            if fate < 1.0:
                if fate < 0.3:  # twice, and out of turn
                    self._past_the_queue(link, to, message, delay * 3.0)
                else:
                    return
        if isinstance(message, Seal) and link.rng.random() < 0.3:  # past the queue, at once
            self._past_the_queue(link, to, message, delay)
            return
        link.last = max(link.last, self.now + delay)
        link.queue.append(_ENCODER.encode(message))
        self.at(link.last - self.now, lambda: self._deliver(link, to))

    def is_cut(self, source: Address, to: Address) -> bool:
        """Whether nothing about blocks gets from one worker to the other now."""
        return any(
            (cut.source, cut.to) == (source.number, to.number) and cut.at <= self.now < cut.until
            for cut in self.scenario.partitions
        )

    def is_apart(self, source: Address, to: Address) -> bool:
        """Whether no block gets from one worker to the other now."""
        return self.is_cut(source, to) or self.opens_at(source, to) > self.now

    def haunt(self, gone: Address) -> None:
        """It was fenced, and its last messages turn up once more."""
        for to, data in self.sent.pop(gone, ()):
            frame = Link(self.rng, gone, queue=deque((data,)))
            self.at(self.rng.random() * 2.0, lambda frame=frame, to=to: self._deliver(frame, to))  # type: ignore[misc]

    def _past_the_queue(self, link: Link, to: Address, message: Message, delay: float) -> None:
        frame = Link(link.rng, link.source, queue=deque((_ENCODER.encode(message),)))
        self.at(delay, lambda: self._deliver(frame, to))

    def _drops(self, link: Link, message: Message) -> bool:
        """Loses tokens now and then, but never a finish: only a gap is noticed."""
        chance = self.scenario.token_loss
        return (
            chance > 0.0
            and isinstance(message, TokenBatch)
            and all(item.finish is None for item in message.items)
            and link.rng.random() < chance
        )

    def _deliver(self, link: Link, to: Address) -> None:
        if not link.queue:
            return  # lost with its sender
        opens_at = self.opens_at(link.source, to)
        if self.now < opens_at < inf:
            self.at(opens_at - self.now, lambda: self._deliver(link, to))  # waits on its way
            return
        data = link.queue.popleft()
        if link.broken or opens_at == inf:
            return
        process = self.processes.get(to)
        if process is None or not process.alive:
            return
        message = _DECODER.decode(data)
        if process.stuck:
            return
        try:
            process.receive(message)
        except Crashed:
            self.kill(process)
