"""Every backend against plain slices, and its promises when things break."""

import importlib.util
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from random import Random

import pytest
from xxhash import xxh3_64_intdigest

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.handoff import PublishBlocks, Pulled, PullEnded, StartPull, TransferNews
from diptych.engine.core.messages import Address, AskPublish, Publish, PullOver, Refused, Send
from diptych.engine.core.request import SeqRef
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.nixl_backend import NixlBackend
from diptych.transfer.nixl_wire import SILENT_S_MAX, nixl_installed, require_nixl
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.porter import Porter
from diptych.transfer.relayout import RelayoutBackend
from diptych.transfer.shared_memory import SharedMemory, create_memory
from diptych.transfer.shm_backend import ShmBackend
from diptych.transfer.spans import Read, ReadDone, ReadFailed, coalesce
from diptych.transfer.tcp_backend import STALL_S_MAX, TcpBackend
from diptych.transfer.tcp_server import BlockServer
from diptych.transfer.tcp_wire import ACCEPTED, ANSWER, NONCE_BYTES
from tests.support.processes import state_of, wait_for

BLOCKS = 64
BLOCK_BYTES = 4096
KEY = b"k" * 32
LAYOUT = b"l" * 32
PEER = (1, 1)


def needs_nixl() -> None:
    if not nixl_installed():
        pytest.skip("NIXL is not installed")


def make_pool(rng: Random) -> PoolMemory:
    page = ControlPage(memoryview(bytearray(page_bytes(BLOCKS, 0))), BLOCKS, 0)
    for block in range(BLOCKS):
        page.clear(block, 100 + block)
    data = memoryview(bytearray(rng.randbytes(BLOCKS * BLOCK_BYTES)))
    return PoolMemory(data, page, BLOCK_BYTES)


def make_shared_pool(rng: Random) -> tuple[PoolMemory, int, int]:
    """As `make_pool`, for other processes to map: with the descriptors of pool and page."""
    made, num_page = make_pool(rng), page_bytes(BLOCKS, 0)
    pool_fd, page_fd = create_memory("pool", len(made.data)), create_memory("page", num_page)
    page = ControlPage(SharedMemory(page_fd, num_page).view, BLOCKS, 0)
    for block in range(BLOCKS):
        page.clear(block, 100 + block)
    data = SharedMemory(pool_fd, len(made.data)).view
    data[:] = made.data
    return PoolMemory(data, page, BLOCK_BYTES), pool_fd, page_fd


class NixlRig:
    """Two workers' NIXL backends: the source's only serves."""

    def __init__(self) -> None:
        rng = Random(1)
        (self.source, *theirs), (self.own, *mine) = make_shared_pool(rng), make_shared_pool(rng)
        self.server = NixlBackend(self.source, *theirs, KEY, LAYOUT, "127.0.0.1")
        self.backend = NixlBackend(self.own, *mine, KEY, LAYOUT, "127.0.0.1")
        self.fds = [*theirs, *mine]


class Rig:
    """A source, an own pool, a backend between them."""

    def __init__(self, kind: str) -> None:
        if kind == "nixl":
            nixl = NixlRig()
            self.source, self.own, self.backend = nixl.source, nixl.own, nixl.backend
            self.server: BlockServer | NixlBackend | None = nixl.server
            self.endpoint = nixl.server.endpoint
            self.fds = nixl.fds
            return
        rng = Random(1)
        self.fds: list[int] = []
        self.source, self.own = make_pool(rng), make_pool(rng)
        self.server = None
        self.endpoint = ""
        if kind == "shm":
            self.backend = ShmBackend(self.own, {0: self.source})
        else:
            self.server = BlockServer("127.0.0.1", self.source, KEY, LAYOUT)
            self.endpoint = self.server.endpoint
            self.backend = TcpBackend(self.own, KEY, LAYOUT)

    def read(self, handle: int, source: list[int], own: list[int]) -> None:
        self.backend.read(Read(handle, PEER, 0, self.endpoint, coalesce(source, own)))

    def wait(self, count: int) -> dict[int, ReadDone | ReadFailed]:
        """Polls as a worker does: when a descriptor is ready, or at once if it is eager."""
        answers: dict[int, ReadDone | ReadFailed] = {}
        until = time.monotonic() + 60.0
        while len(answers) < count:
            assert time.monotonic() < until, f"{len(answers)} of {count} answers"
            fds = self.backend.fds()
            if fds and not self.backend.eager:
                select.select(list(fds), [fd for fd, write in fds.items() if write], [], 0.1)
            if isinstance(self.server, NixlBackend):
                self.server.poll()  # its own worker's turn
            for answer in self.backend.poll():
                assert answer.handle not in answers, "answered twice"
                answers[answer.handle] = answer
        return answers

    def close(self) -> None:
        self.backend.close()
        if self.server is not None:
            self.server.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture(params=["shm", "tcp", "nixl"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param == "nixl":
        needs_nixl()
    made = Rig(request.param)
    yield made
    made.close()


def test_scattered_blocks_arrive_where_they_belong(rig: Rig) -> None:
    rng, expected, handle = Random(2), bytearray(rig.own.data), 0
    places = rng.sample(range(BLOCKS), BLOCKS)
    for start in range(0, BLOCKS, 8):
        handle += 1
        source = [start, start + 1, *rng.sample(range(BLOCKS), 6)]
        own = places[start : start + 8]
        rig.read(handle, source, own)
        for a, b in zip(source, own, strict=True):
            piece = rig.source.blocks(a, 1)
            expected[b * BLOCK_BYTES : (b + 1) * BLOCK_BYTES] = piece
    answers = rig.wait(handle)
    assert bytes(rig.own.data) == expected
    for answer in answers.values():
        assert isinstance(answer, ReadDone)
        assert all(generation >= 100 for generation in answer.generations)


def test_generations_and_digests_stand_in_the_order_of_the_spans(rig: Rig) -> None:
    source = [9, 10, 4, 63]
    rig.source.page.clear(4, 999)
    rig.read(1, source, [1, 2, 3, 0])
    answer = rig.wait(1)[1]
    digests = [xxh3_64_intdigest(rig.source.blocks(block, 1)) for block in source]
    assert answer == ReadDone(1, [109, 110, 999, 163], digests)


def test_a_cancelled_read_writes_nothing_more_and_is_answered(rig: Rig) -> None:
    before = bytes(rig.own.data)
    rig.read(1, [1, 2], [1, 2])
    rig.backend.cancel(1)
    rig.read(2, [3], [40])
    answers = rig.wait(2)
    assert isinstance(answers[1], ReadFailed)
    assert isinstance(answers[2], ReadDone)
    after = bytes(rig.own.data)
    size = BLOCK_BYTES
    if not isinstance(rig.backend, NixlBackend):  # it may have read before it was told
        assert after[: 40 * size] == before[: 40 * size]
    assert after[40 * size : 41 * size] == bytes(rig.source.blocks(3, 1))


def test_a_cancel_in_the_middle_of_a_block() -> None:
    """The server is the test's own, so that it can stop there."""
    rig = Rig("tcp")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        rig.endpoint = "{}:{}".format(*listener.getsockname())
        rig.read(1, [1, 2, 3], [1, 2, 3])
        peer = listener.accept()[0]
    peer.sendall(bytes(NONCE_BYTES))
    while not select.select([peer], [], [], 0)[0]:
        rig.backend.poll()
    assert peer.recv(4096).endswith(LAYOUT)
    peer.sendall(bytes([ACCEPTED]) + ANSWER.pack(1, 3) + b"A" * (BLOCK_BYTES // 2))
    until = time.monotonic() + 10.0
    while rig.own.data[BLOCK_BYTES + BLOCK_BYTES // 2 - 1] != ord("A"):
        assert time.monotonic() < until
        assert not rig.backend.poll()
    frozen = bytes(rig.own.data)
    rig.backend.cancel(1)
    rig.read(2, [5], [5])
    peer.sendall(b"A" * (BLOCK_BYTES * 5 // 2) + bytes(24))
    peer.sendall(ANSWER.pack(2, 1) + b"B" * BLOCK_BYTES + bytes(8))
    answers = rig.wait(2)
    assert isinstance(answers[1], ReadFailed)
    assert isinstance(answers[2], ReadDone)
    assert bytes(rig.own.data[: 5 * BLOCK_BYTES]) == frozen[: 5 * BLOCK_BYTES]
    assert bytes(rig.own.blocks(5, 1)) == b"B" * BLOCK_BYTES
    peer.close()
    rig.close()


@pytest.mark.parametrize(
    ("key", "layout", "reason"), [(b"x" * 32, LAYOUT, "key"), (KEY, b"m" * 32, "layout")]
)
def test_strangers_get_nothing(key: bytes, layout: bytes, reason: str) -> None:
    rig = Rig("tcp")
    before = bytes(rig.own.data)
    rig.backend = TcpBackend(rig.own, key, layout)
    rig.read(1, [1], [1])
    answer = rig.wait(1)[1]
    assert isinstance(answer, ReadFailed)
    assert reason in answer.reason
    assert answer.refused
    assert bytes(rig.own.data) == before
    rig.close()


def test_a_source_that_is_gone_fails_its_reads() -> None:
    rig = Rig("tcp")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        rig.endpoint = "{}:{}".format(*listener.getsockname())
        rig.read(1, [1], [1])
        rig.read(2, [2], [2])
        listener.accept()[0].close()
    answers = rig.wait(2)
    assert all(isinstance(answer, ReadFailed) for answer in answers.values())
    rig.read(3, [1], [1])  # nobody listens any more
    assert isinstance(rig.wait(1)[3], ReadFailed)
    rig.close()


def test_what_is_not_in_the_pool_is_not_served() -> None:
    rig = Rig("tcp")
    rig.read(1, [BLOCKS], [1])
    assert isinstance(rig.wait(1)[1], ReadFailed)
    rig.close()


class FlippingBackend(ShmBackend):
    """Every third block that passes has a wrong bit."""

    count = 0

    def _copy(self, read: Read) -> list[int]:
        super()._copy(read)
        for span in read.spans:
            for block in range(span.own, span.own + span.count):
                self.count += 1
                if self.count % 3 == 0:
                    self._own.blocks(block, 1)[self.count % BLOCK_BYTES] ^= 1
        return self._own.digests(
            [b for span in read.spans for b in range(span.own, span.own + span.count)]
        )


def test_porters_move_blocks_through_a_lying_backend() -> None:
    rng = Random(3)
    source, own = make_pool(rng), make_pool(rng)
    wire: list[Send] = []
    news: list[TransferNews] = []
    here, there = Address("worker", 5, 9), Address("worker", 1, 1)
    reader = Porter(here, own, {0: FlippingBackend(own, {0: source})}, "", wire.append, news.append)
    writer = Porter(there, source, {}, "", wire.append, news.append)
    ref, blocks = SeqRef("r", 0, 0), list(range(20, 30))
    generations = [source.page.generation(block) for block in blocks]
    mine = list(range(3, 13))
    reader.order(StartPull(1, ref, PEER, 0, 0, blocks, generations, mine))
    writer.order(PublishBlocks(1, ref, (5, 9), 0, blocks))
    for _ in range(50):
        while wire:
            send = wire.pop(0)
            assert isinstance(send.message, Publish | AskPublish | PullOver)
            (reader if send.to == here else writer).hear(send.message)
        reader.turn()
        if news and isinstance(news[-1], PullEnded):
            break
    assert news[-1] == PullEnded(ref, True, 10, news[-1].read_s)  # type: ignore[union-attr]
    assert [item.upto for item in news if isinstance(item, Pulled)][-1] == 10
    assert bytes(own.blocks(3, 10)) == bytes(source.blocks(20, 10))


def test_a_peer_that_stands_still_is_given_up() -> None:
    """By the backend's own clock; the listener of the test never says a word."""
    now = [0.0]
    own = make_pool(Random(1))
    backend = TcpBackend(own, KEY, LAYOUT, clock=lambda: now[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = "{}:{}".format(*listener.getsockname())
        now[0] = 100.0
        for handle in (1, 2):
            backend.read(Read(handle, PEER, 0, endpoint, coalesce([1], [1])))
        now[0] += STALL_S_MAX
        assert backend.poll() == []
        now[0] += 0.1
        answers = backend.poll()
        assert [(answer.handle, getattr(answer, "lost", None)) for answer in answers] == [
            (1, True),
            (2, True),
        ]
    backend.close()


def test_reads_survive_the_end_of_either_nixl_process() -> None:
    """They fail, nothing is half answered, and the same endpoint serves again."""
    needs_nixl()
    rig = Rig("nixl")
    assert isinstance(rig.server, NixlBackend)
    assert isinstance(rig.backend, NixlBackend)
    rig.read(1, [1, 2, 60], [1, 2, 3])
    assert isinstance(rig.wait(1)[1], ReadDone)
    handle = 1
    for victim in (rig.backend, rig.server, rig.backend):
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        while True:  # as the pull machine does: again after each failure
            handle += 1
            rig.read(handle, [handle % BLOCKS, 7], [8, 9])
            answer = rig.wait(1)[handle]
            if isinstance(answer, ReadDone):
                break
        assert bytes(rig.own.blocks(8, 1)) == bytes(rig.source.blocks(handle % BLOCKS, 1))
        assert answer.generations == [100 + handle % BLOCKS, 107]
    rig.close()


def test_a_nixl_process_that_stands_still_is_killed() -> None:
    needs_nixl()
    rig = Rig("nixl")
    assert isinstance(rig.backend, NixlBackend)
    rig.read(1, [1], [1])
    assert isinstance(rig.wait(1)[1], ReadDone)
    now = [time.monotonic()]  # not before: NIXL may have taken seconds to load
    rig.backend._clock = lambda: now[0]
    pid = rig.backend.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wait_for("it stands still", lambda: state_of(pid) == "T")
    rig.read(2, [2], [2])
    assert rig.backend.poll() == []
    now[0] += SILENT_S_MAX + 1.0
    answer = rig.wait(1)[2]
    assert isinstance(answer, ReadFailed)
    assert rig.backend.pid != pid
    rig.close()


def test_without_nixl_the_way_through_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        require_nixl()


class Doubling:
    """A conversion that shows: each own byte is the staged one plus one."""

    def __init__(self, staging: PoolMemory, own: PoolMemory) -> None:
        self.staging, self.own = staging, own

    def __call__(self, staging: Sequence[int], own: Sequence[int]) -> None:
        for a, b in zip(staging, own, strict=True):
            raised = bytes((byte + 1) % 256 for byte in self.staging.blocks(a, 1))
            self.own.blocks(b, 1)[:] = raised


def test_other_layouts_are_read_as_they_are_and_then_converted() -> None:
    """With room for one read of four blocks: the others wait, and one of those is cancelled."""
    rng = Random(5)
    source, own, staging = make_pool(rng), make_pool(rng), make_pool(rng)
    inner = ShmBackend(staging, {0: source})
    backend = RelayoutBackend(inner, Doubling(staging, own), num_staging=4)
    before = bytes(own.data)
    reads = {1: ([9, 10, 4, 63], [1, 2, 3, 0]), 2: ([5, 6], [8, 20]), 3: ([7], [30])}
    for handle, (from_, to) in reads.items():
        backend.read(Read(handle, PEER, 0, "", coalesce(from_, to)))
    backend.cancel(3)
    answers: dict[int, ReadDone | ReadFailed] = {}
    while len(answers) < 3:
        assert backend.eager
        answers |= {answer.handle: answer for answer in backend.poll()}
    assert answers[3] == ReadFailed(3, "cancelled")
    for handle in (1, 2):
        from_, to = reads[handle]
        digests = [xxh3_64_intdigest(source.blocks(block, 1)) for block in from_]
        assert answers[handle] == ReadDone(handle, [100 + block for block in from_], digests)
        for a, b in zip(from_, to, strict=True):
            assert bytes(own.blocks(b, 1)) == bytes((x + 1) % 256 for x in source.blocks(a, 1))
    size = BLOCK_BYTES
    assert bytes(own.blocks(30, 1)) == before[30 * size : 31 * size]


def test_a_running_read_that_is_cancelled_is_not_converted() -> None:
    rng = Random(6)
    source, own, staging = make_pool(rng), make_pool(rng), make_pool(rng)
    backend = RelayoutBackend(ShmBackend(staging, {0: source}), Doubling(staging, own))
    before = bytes(own.data)
    backend.read(Read(1, PEER, 0, "", coalesce([1, 2], [3, 4])))
    backend.cancel(1)
    assert [type(answer) for answer in backend.poll()] == [ReadFailed]
    assert bytes(own.data) == before


def test_a_pair_of_other_layouts_is_refused_before_anything_moves() -> None:
    """The reader takes the source's layout for another one: one greeting, and the pull is over."""
    rng = Random(8)
    source, own = make_pool(rng), make_pool(rng)
    before = bytes(own.data)
    server = BlockServer("127.0.0.1", source, KEY, LAYOUT)
    backend = TcpBackend(own, KEY, b"m" * 32)
    wire: list[Send] = []
    news: list[TransferNews] = []
    here, there = Address("worker", 5, 9), Address("worker", 1, 1)
    reader = Porter(here, own, {0: backend}, "", wire.append, news.append)
    writer = Porter(there, source, {}, server.endpoint, wire.append, news.append)
    ref, blocks = SeqRef("r", 0, 0), list(range(20, 30))
    generations = [source.page.generation(block) for block in blocks]
    reader.order(StartPull(1, ref, PEER, 0, 0, blocks, generations, list(range(10))))
    writer.order(PublishBlocks(1, ref, (5, 9), 0, blocks))
    until = time.monotonic() + 10.0
    while not news:
        assert time.monotonic() < until
        for send in wire[:]:
            assert isinstance(send.message, Publish | AskPublish | PullOver)
            (reader if send.to == here else writer).hear(send.message)
        wire.clear()
        select.select(list(reader.fds()), [], [], 0.05)
        reader.turn()
    refused = [Refused(0, PEER, "refused: its blocks have another layout")]
    assert news == [PullEnded(ref, False, 0, news[0].read_s, refused)]  # type: ignore[union-attr]
    assert bytes(own.data) == before
    reader.close()
    server.close()
