"""Channels between hosts: locked, in order, parked while nobody knows where, cut only once."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import Address, AnyMessage, Cut, Peers, Ready, SetDial, Stuck
from diptych.transfer.channels import SUPERVISOR, Channels
from diptych.transfer.far import PARKED_FRAMES_MAX
from diptych.transfer.network import Network, derived_key, new_secret, public_of

WAIT_S = 10.0
SECRET = new_secret()
A, B = Address("worker", 0, 1), Address("worker", 1, 1)


class Hosts:
    """Two hosts: a run directory each, with a supervisor that only listens."""

    def __init__(self, folder: Path) -> None:
        self.dirs = [folder / name for name in "ab"]
        for path in self.dirs:
            path.mkdir()
        self.supervisors = [Channels(path, SUPERVISOR) for path in self.dirs]
        self.open = list(self.supervisors)

    def channels(self, host: int, me: Address, secret: str = SECRET) -> Channels:
        channels = Channels(self.dirs[host], me, Network("127.0.0.1", secret))
        self.open.append(channels)
        return channels

    def tell(self, host: int, to: Channels, news: Peers) -> None:
        assert self.supervisors[host].send_to(to.me, news)
        assert to.receive(WAIT_S) == []  # it is for the channels themselves

    def close(self) -> None:
        for channels in self.open:
            channels.close()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    folder = Path(tempfile.mkdtemp(prefix="dtf"))  # tmp_path is too long for a unix socket
    made = Hosts(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def hear(channels: Channels, count: int, *others: Channels) -> list[AnyMessage]:
    """The next `count` messages; the others turn as well, since handshakes have two sides."""
    got: list[AnyMessage] = []
    until_s = time.monotonic() + WAIT_S
    while len(got) < count:
        assert time.monotonic() < until_s, f"only {len(got)} of {count} came"
        got += channels.receive(0.01)
        for other in others:
            other.receive(0)
    return got


def test_what_is_sent_before_anybody_knows_where_comes_first(hosts: Hosts) -> None:
    a, b = hosts.channels(0, A), hosts.channels(1, B)
    sent = [SetDial(1, 1, dial) for dial in range(500)]
    assert all(a.send_to(B, message) for message in sent[:200])
    hosts.tell(0, a, Peers([(B, b.endpoint)], []))
    assert all(a.send_to(B, message) for message in sent[200:])
    assert hear(b, len(sent), a) == sent


def test_ready_says_where_other_hosts_reach_it(hosts: Hosts) -> None:
    a = hosts.channels(0, A)
    a.announce()
    assert hear(hosts.supervisors[0], 1) == [Ready("worker0", 1, a.endpoint)]
    assert a.endpoint.startswith("tcp://127.0.0.1:")


def test_peers_of_the_same_host_need_no_directory(hosts: Hosts) -> None:
    a, b = hosts.channels(0, A), hosts.channels(0, B)
    assert a.send_to(B, SetDial(1, 1, 5))
    assert hear(b, 1) == [SetDial(1, 1, 5)]
    assert a._peers["worker", 1].far is None


def test_what_waits_is_bounded_and_forgotten_with_its_receiver(hosts: Hosts) -> None:
    a = hosts.channels(0, A)
    answers = [a.send_to(B, SetDial(1, 1, 1)) for _ in range(PARKED_FRAMES_MAX + 1)]
    assert answers == [True] * PARKED_FRAMES_MAX + [False]
    assert hear(hosts.supervisors[0], 1) == [Stuck(B)]
    hosts.tell(0, a, Peers([], [B]))
    assert a.send_to(B, SetDial(1, 1, 1))


def test_a_connection_that_breaks_is_reported_once_and_not_made_again(hosts: Hosts) -> None:
    a, b = hosts.channels(0, A), hosts.channels(1, B)
    endpoint = b.endpoint
    hosts.tell(0, a, Peers([(B, endpoint)], []))
    assert a.send_to(B, SetDial(1, 1, 1))
    assert hear(b, 1, a) == [SetDial(1, 1, 1)]
    b.close()
    hosts.open.remove(b)
    assert hear(hosts.supervisors[0], 1, a) == [Cut(A, B)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    squatter: zmq.Socket[bytes] = context.socket(zmq.PULL)  # whoever gets the port next
    try:
        squatter.bind(endpoint)
        for _ in range(30):
            a.send_to(B, SetDial(1, 1, 2))
            a.receive(0.01)
        assert not squatter.poll(0)
        assert hosts.supervisors[0].receive(0) == []
    finally:
        squatter.close(0)
        context.term()


@pytest.mark.parametrize("how", ["no key", "another key", "another client key"])
def test_a_stranger_is_not_heard(hosts: Hosts, how: str) -> None:
    a, b = hosts.channels(0, A), hosts.channels(1, B)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    try:
        if how != "no key":
            public, private = zmq.curve_keypair()
            stranger.curve_publickey, stranger.curve_secretkey = public, private
            stranger.curve_serverkey = public if how == "another key" else public_of(SECRET)
        refused = stranger.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        stranger.connect(b.endpoint)
        stranger.send(msgspec.msgpack.encode(SetDial(1, 1, 99)))
        until_s = time.monotonic() + WAIT_S
        while not refused.poll(0):
            assert time.monotonic() < until_s, "it was let in"
            assert b.receive(0.01) == []
        hosts.tell(0, a, Peers([(B, b.endpoint)], []))
        assert a.send_to(B, SetDial(1, 1, 7))
        assert hear(b, 1, a) == [SetDial(1, 1, 7)]
        stranger.disable_monitor()
        refused.close(0)
    finally:
        stranger.close(0)
        context.term()


def test_a_member_of_another_launch_is_not_heard(hosts: Hosts) -> None:
    a, b = hosts.channels(0, A, new_secret()), hosts.channels(1, B)
    hosts.tell(0, a, Peers([(B, b.endpoint)], []))
    a.send_to(B, SetDial(1, 1, 1))  # the connection may be over before this
    assert hear(hosts.supervisors[0], 1, a, b) == [Cut(A, B)]
    assert b.counts.received == 0


def test_keys() -> None:
    with pytest.raises(ConfigError, match="40 characters"):
        public_of("nonsense")
    assert derived_key(SECRET, "blocks") != derived_key(SECRET, "other")
    assert derived_key(SECRET, "blocks") != derived_key(new_secret(), "blocks")
