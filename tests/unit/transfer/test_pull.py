"""The reader's machine, driven by hand: what it reads, believes, repeats and gives up."""

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from diptych.engine.core.handoff import PublishBlocks, Pulled, PullEnded, StartPull
from diptych.engine.core.messages import AskPublish, Publish, PullOver, Refused, Send
from diptych.engine.core.request import SeqRef
from diptych.transfer.publish import RECORDS_MAX, Publisher
from diptych.transfer.pull import (
    ASK_S,
    BAD_MAX,
    READ_BLOCKS_MAX,
    READS_MAX,
    PullCommand,
    Puller,
    read_blocks,
)
from diptych.transfer.spans import CancelRead, Read, ReadDone, ReadFailed, Span, coalesce

REF = SeqRef("r", 0, 0)
SOURCE = (3, 7)  # worker, epoch
ME = (5, 9)


def start(num_blocks: int) -> StartPull:
    return StartPull(
        scheduler_epoch=1,
        ref=REF,
        peer=SOURCE,
        pool=0,
        first=2,
        source=[100 + i for i in range(num_blocks)],
        generations=[1000 + i for i in range(num_blocks)],
        blocks=[10 + i for i in range(num_blocks)],
    )


def publish(count: int, **changes: object) -> Publish:
    fields: dict[str, object] = {
        "scheduler_epoch": 1,
        "worker": SOURCE[0],
        "worker_epoch": SOURCE[1],
        "peer_epoch": ME[1],
        "ref": REF,
        "first": 2,
        "digests": list(range(count)),
        "endpoint": "e",
    }
    return Publish(**(fields | changes))  # type: ignore[arg-type]  # the tests' own keywords


@dataclass
class Driver:
    """Digests of block i are i, generations 1000 + i."""

    puller: Puller = field(default_factory=lambda: Puller(*ME))
    now: float = 0.0
    reads: list[Read] = field(default_factory=list)
    news: list[Pulled | PullEnded] = field(default_factory=list)
    asks: int = 0
    overs: int = 0

    def take(self) -> list[PullCommand]:
        self.puller.check_integrity()
        commands = self.puller.take()
        for command in commands:
            if isinstance(command, Read):
                self.reads.append(command)
            elif isinstance(command, Pulled | PullEnded):
                self.news.append(command)
            elif isinstance(command, Send):
                assert (command.to.number, command.to.epoch) == SOURCE
                self.asks += isinstance(command.message, AskPublish)
                self.overs += isinstance(command.message, PullOver)
        return commands

    def blocks(self, read: Read) -> list[int]:
        """Places in the order's lists."""
        return [span.source - 100 + i for span in read.spans for i in range(span.count)]

    def done(
        self, read: Read, *, bad: set[int] | None = None, moved: set[int] | None = None
    ) -> None:
        blocks = self.blocks(read)
        digests = [-1 if i in (bad or ()) else i for i in blocks]
        generations = [1000 + i + (i in (moved or ())) for i in blocks]
        self.reads.remove(read)
        self.puller.read_done(ReadDone(read.handle, generations, digests), self.now)
        self.take()


def test_blocks_are_read_as_they_are_published() -> None:
    driver = Driver()
    driver.puller.start(start(4), 0.0)
    assert not driver.take()
    driver.puller.publish(publish(2), 0.0)
    driver.take()
    assert driver.reads[0].spans == [Span(100, 10, 2)]
    driver.done(driver.reads[0])
    assert driver.news == [Pulled(REF, 4)]
    driver.puller.publish(publish(4), 0.0)
    driver.take()
    assert driver.reads[0].spans == [Span(102, 12, 2)]
    driver.now = 0.5
    driver.done(driver.reads[0])
    assert driver.news[1:] == [Pulled(REF, 6), PullEnded(REF, True, 4, 0.5)]
    assert driver.overs == 1
    assert not len(driver.puller)


def test_a_publish_may_come_before_its_order_and_twice_and_late() -> None:
    driver = Driver()
    driver.puller.publish(publish(3), 0.0)
    driver.puller.publish(publish(1), 0.0)
    driver.puller.start(start(3), 0.0)
    driver.take()
    driver.puller.publish(publish(2), 0.0)
    driver.puller.publish(publish(3), 0.0)
    driver.take()
    assert [driver.blocks(read) for read in driver.reads] == [[0, 1, 2]]


def test_what_is_of_another_incarnation_is_ignored() -> None:
    for changes in (
        {"worker_epoch": 8},
        {"peer_epoch": 8},
        {"scheduler_epoch": 2},
        {"first": 1},
        {"ref": SeqRef("r", 0, 1)},
    ):
        driver = Driver()
        driver.puller.start(start(2), 0.0)
        driver.puller.publish(publish(2, **changes), 0.0)
        assert not driver.take(), changes


def test_a_bad_block_alone_is_read_again() -> None:
    driver = Driver()
    driver.puller.start(start(4), 0.0)
    driver.puller.publish(publish(4), 0.0)
    driver.take()
    driver.done(driver.reads[0], bad={1})
    assert driver.news == [Pulled(REF, 3)], "the blocks before the bad one"
    assert driver.blocks(driver.reads[0]) == [1]
    driver.done(driver.reads[0])
    assert driver.news[1:] == [Pulled(REF, 6), PullEnded(REF, True, 4, 0.0)]


def test_a_source_that_stays_bad_is_given_up() -> None:
    driver = Driver()
    driver.puller.start(start(2), 0.0)
    driver.puller.publish(publish(2), 0.0)
    driver.take()
    for _ in range(BAD_MAX + 1):
        driver.done(driver.reads[0], bad={1})
    assert driver.news[-1] == PullEnded(REF, False, 1, 0.0)


def test_a_block_with_another_life_ends_the_pull() -> None:
    driver = Driver()
    driver.puller.start(start(3), 0.0)
    driver.puller.publish(publish(3), 0.0)
    driver.take()
    driver.done(driver.reads[0], moved={1})  # although every digest is right
    assert [type(news) for news in driver.news] == [PullEnded]
    assert not driver.news[0].complete  # type: ignore[union-attr]


def test_a_failed_read_is_repeated_after_a_while() -> None:
    driver = Driver()
    driver.puller.start(start(2), 0.0)
    driver.puller.publish(publish(2), 0.0)
    driver.take()
    driver.puller.read_failed(ReadFailed(driver.reads.pop().handle, "test"), 1.0)
    driver.take()
    assert not driver.reads
    assert driver.puller.due_at() == 1.0 + ASK_S
    driver.puller.tick(1.0 + ASK_S)
    driver.take()
    assert driver.blocks(driver.reads[0]) == [0, 1]


def test_a_lost_source_is_not_asked_again() -> None:
    driver = Driver()
    driver.puller.start(start(READ_BLOCKS_MAX * 2), 0.0)
    driver.puller.publish(publish(READ_BLOCKS_MAX * 2), 0.0)
    driver.take()
    assert len(driver.reads) == 2
    driver.puller.read_failed(ReadFailed(driver.reads.pop(0).handle, "test", lost=True), 1.0)
    driver.take()
    assert not driver.news, "the other read still writes"
    driver.done(driver.reads[0])
    assert [type(news) for news in driver.news] == [PullEnded]
    assert not driver.news[0].complete  # type: ignore[union-attr]


def test_a_refusal_ends_the_pull_and_says_why_once() -> None:
    driver = Driver()
    driver.puller.start(start(READ_BLOCKS_MAX * 2), 0.0)
    driver.puller.publish(publish(READ_BLOCKS_MAX * 2), 0.0)
    driver.take()
    for read in list(driver.reads):
        driver.puller.read_failed(ReadFailed(read.handle, "other layout", refused=True), 1.0)
    driver.take()
    order = start(1)
    why = [Refused(order.pool, order.peer, "other layout")]
    assert driver.news == [PullEnded(REF, False, 0, 1.0, why)]


def test_big_blocks_are_read_in_fewer() -> None:
    assert read_blocks(1 << 10) == 256
    assert read_blocks(32 << 10) == 128
    assert read_blocks(1 << 20) == 8
    assert read_blocks(64 << 20) == 8
    driver = Driver(Puller(*ME, read_blocks_max=3))
    driver.puller.start(start(7), 0.0)
    driver.puller.publish(publish(7), 0.0)
    driver.take()
    assert [len(driver.blocks(read)) for read in driver.reads] == [3, 3]


def test_silence_is_asked_about_ever_more_rarely() -> None:
    driver = Driver()
    driver.puller.start(start(2), 0.0)
    times = []
    for _ in range(8):
        due = driver.puller.due_at()
        assert due is not None
        driver.puller.tick(due)
        driver.take()
        times.append(due)
    assert driver.asks == 8
    gaps = [round(b - a, 9) for a, b in pairwise(times)]
    assert gaps == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    driver.puller.publish(publish(2), times[-1])
    assert driver.puller.due_at() is None, "nothing is missing that could be asked for"


def test_a_cancel_waits_for_its_reads_and_for_nothing_else() -> None:
    driver = Driver()
    driver.puller.start(start(READ_BLOCKS_MAX * 5), 0.0)
    driver.puller.publish(publish(READ_BLOCKS_MAX * 5), 0.0)
    driver.take()
    assert len(driver.reads) == READS_MAX
    driver.puller.cancel(REF)
    cancelled = [c.handle for c in driver.take() if isinstance(c, CancelRead)]
    assert cancelled == [read.handle for read in driver.reads]
    driver.done(driver.reads[0])
    assert not driver.news, "a read still writes"
    driver.puller.read_failed(ReadFailed(driver.reads[0].handle, "cancelled"), 0.0)
    driver.take()
    assert driver.news == [PullEnded(REF, False, 0, 0.0)]


def test_a_cancel_before_anything_ends_at_once() -> None:
    driver = Driver()
    driver.puller.start(start(2), 0.0)
    driver.puller.cancel(REF)
    driver.puller.cancel(REF)
    driver.take()
    assert driver.news == [PullEnded(REF, False, 0, 0.0)]


def test_spans_are_whole_and_as_few_as_can_be() -> None:
    rng = Random(4)
    for _ in range(300):
        count = rng.randint(1, 12)
        source = rng.sample(range(20), count)
        own = rng.sample(range(20), count)
        if rng.random() < 0.5:
            source, own = sorted(source), sorted(own)
        spans = coalesce(source, own)
        pairs = [(s.source + i, s.own + i) for s in spans for i in range(s.count)]
        assert pairs == list(zip(source, own, strict=True))
        breaks = sum((b - a, d - c) != (1, 1) for (a, c), (b, d) in pairwise(pairs))
        assert len(spans) == breaks + 1


def test_a_publisher_repeats_all_that_it_said() -> None:
    publisher = Publisher(*SOURCE, "e")
    publisher.publish(PublishBlocks(1, REF, ME, 2, [7, 8]), [70, 80])
    second = publisher.publish(PublishBlocks(1, REF, ME, 4, [9]), [90])
    assert second.message == publish(0, digests=[70, 80, 90])
    ask = AskPublish(1, ME[0], ME[1], SOURCE[1], REF)
    assert publisher.ask(ask) == second
    for wrong in (AskPublish(1, ME[0], 8, SOURCE[1], REF), AskPublish(1, ME[0], ME[1], 8, REF)):
        assert publisher.ask(wrong) is None
    publisher.over(PullOver(1, ME[0], ME[1], SOURCE[1], REF))
    assert publisher.ask(ask) is None


def test_a_publisher_is_bounded_and_forgets_older_schedulers() -> None:
    publisher = Publisher(*SOURCE, "")
    for i in range(RECORDS_MAX + 5):
        publisher.publish(PublishBlocks(1, SeqRef(str(i), 0, 0), ME, 0, [1]), [1])
    assert len(publisher) == RECORDS_MAX
    publisher.publish(PublishBlocks(2, REF, ME, 0, [1]), [1])
    assert len(publisher) == 1
