"""Channels: order, bounds, incarnations, malformed frames; blocking and asyncio."""

import asyncio
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import (
    Address,
    AnyMessage,
    ApiUp,
    SchedulerUp,
    Seal,
    SetDial,
    Stuck,
)
from diptych.engine.core.request import SeqRef
from diptych.transfer.channels import SUPERVISOR, AsyncChannels, Channels, socket_path

WAIT_S = 5.0


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dtc"))  # tmp_path is too long for a unix socket
    yield folder
    shutil.rmtree(folder)


def receive_count(channels: Channels, count: int) -> list[AnyMessage]:
    messages: list[AnyMessage] = []
    while len(messages) < count:
        some = channels.receive(WAIT_S)
        assert some, f"only {len(messages)} of {count} came"
        messages += some
    return messages


def test_messages_arrive_in_order(run_dir: Path) -> None:
    me, peer = Address("scheduler", 0, 1), Address("worker", 3, 7)
    sender, receiver = Channels(run_dir, me), Channels(run_dir, peer)
    try:
        sent = [SetDial(1, 7, dial) for dial in range(3000)]
        assert all(sender.send_to(peer, message) for message in sent)
        assert receive_count(receiver, len(sent)) == sent
        assert receiver.receive(0) == []
    finally:
        sender.close()
        receiver.close()
    assert list(run_dir.iterdir()) == []


def test_seals_take_the_short_cut_and_none_is_lost_when_it_is_full(run_dir: Path) -> None:
    sender, receiver = (Channels(run_dir, Address("worker", number, 1)) for number in (0, 1))
    try:
        sent = [Seal(1, 0, 1, 1, SeqRef(f"r{i}", 0, 0), i, 5, None, None) for i in range(3000)]
        assert all(sender.send_to(receiver.me, seal) for seal in sent)
        got = receive_count(receiver, len(sent))
        assert sorted(got, key=lambda seal: seal.num_computed) == sent  # type: ignore[union-attr]
    finally:
        sender.close()
        receiver.close()
    assert list(run_dir.iterdir()) == []


def test_a_seal_to_nobody_is_refused_by_the_short_cut_and_queued(run_dir: Path) -> None:
    sender = Channels(run_dir, Address("worker", 0, 1), queue_frames=2)
    try:
        seal = Seal(1, 0, 1, 1, SeqRef("r", 0, 0), 1, 5, None, None)
        peer = Address("worker", 1, 1)
        assert [sender.send_to(peer, seal) for _ in range(3)] == [True, True, False]
    finally:
        sender.close()


def test_full_queue_is_refused_at_once(run_dir: Path) -> None:
    peer = Address("worker", 0, 1)  # nobody ever binds it
    sender = Channels(run_dir, Address("api", 0, 1), queue_frames=8)
    try:
        sent = [sender.send_to(peer, ApiUp(0, 1)) for _ in range(20)]
        assert sent == [True] * 8 + [False] * 12
        assert sender.counts.dropped == 12
    finally:
        sender.close()


def test_a_peer_that_stops_reading_is_reported_once(run_dir: Path) -> None:
    supervisor = Channels(run_dir, SUPERVISOR)
    sender = Channels(run_dir, Address("api", 0, 1), queue_frames=8)
    try:
        for epoch in (1, 1, 2):
            for _ in range(20):
                sender.send_to(Address("worker", 0, epoch), ApiUp(0, 1))
        peers = [Address("worker", 0, 1), Address("worker", 0, 2)]
        assert receive_count(supervisor, 2) == [Stuck(peer) for peer in peers]
        assert supervisor.receive(0) == []
    finally:
        sender.close()
        supervisor.close()


def test_a_newer_incarnation_replaces_the_older(run_dir: Path) -> None:
    sender = Channels(run_dir, Address("api", 0, 1))
    second = Channels(run_dir, Address("worker", 0, 2))
    try:
        assert sender.send_to(Address("worker", 0, 1), ApiUp(0, 1))
        assert sender.send_to(second.me, ApiUp(0, 2))
        assert not sender.send_to(Address("worker", 0, 1), ApiUp(0, 3))
        assert second.receive(WAIT_S) == [ApiUp(0, 2)]
    finally:
        sender.close()
        second.close()


def test_malformed_frames_are_counted_and_dropped(run_dir: Path) -> None:
    receiver = Channels(run_dir, Address("scheduler", 0, 1))
    context = zmq.Context()
    raw: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    raw.connect(f"ipc://{socket_path(run_dir, receiver.me)}")
    seed = 7
    frames = [b"", b"\xc1", msgspec.msgpack.encode(["NoSuch", 1]), b"\x91" * 5000, b"\xdd\xff\xff"]
    rng = random.Random(seed)
    frames += [rng.randbytes(64) for _ in range(7)]
    good = msgspec.msgpack.encode(SchedulerUp(4))
    try:
        for frame in [*frames, good]:
            raw.send(frame)
        got: list[AnyMessage] = []
        while receiver.counts.received <= len(frames):  # bad frames alone give an empty list
            got += receiver.receive(WAIT_S)
        assert got == [SchedulerUp(4)], f"seed {seed}"
        assert receiver.counts.malformed == len(frames)
    finally:
        raw.close(linger=0)
        context.term()
        receiver.close()


def test_a_long_path_is_an_error_for_the_user(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="TMPDIR"):
        Channels(run_dir / ("x" * 120), Address("api", 0, 1))


def test_asyncio_gets_every_message_also_of_a_burst(run_dir: Path) -> None:
    async def scenario() -> list[AnyMessage]:
        got: list[AnyMessage] = []
        done = asyncio.Event()

        def on_message(message: AnyMessage) -> None:
            got.append(message)
            if len(got) == 5000:
                done.set()

        sender = Channels(run_dir, Address("worker", 0, 1))
        receiver = AsyncChannels(run_dir, Address("api", 0, 1), on_message)
        for epoch in range(5000):
            assert sender.send_to(receiver.channels.me, SchedulerUp(epoch))
        await asyncio.wait_for(done.wait(), WAIT_S)
        receiver.close()
        sender.close()
        return got

    assert asyncio.run(scenario()) == [SchedulerUp(epoch) for epoch in range(5000)]
