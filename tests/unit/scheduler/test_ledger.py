"""The ledger against a naive model that keeps, per sequence, the blocks it uses."""

import random

import pytest

from diptych.scheduler.commands import PageEntry
from diptych.scheduler.ledger import BlockState, PoolLedger

ROOT = b"r" * 32


def name(value: int) -> bytes:
    return value.to_bytes(32, "big")


def commit(ledger: PoolLedger, block: int, value: int, parent: bytes = ROOT) -> bool:
    return ledger.commit(block, ledger.generations[block], name(value), parent)


def test_the_path_of_one_block() -> None:
    ledger = PoolLedger(4)
    [block] = ledger.allocate(1)
    assert ledger.state(block) is BlockState.PRIVATE
    assert ledger.generations[block] == 1
    assert commit(ledger, block, 1)
    assert ledger.state(block) is BlockState.SHARED
    ledger.share([block])
    ledger.release([block])
    assert ledger.state(block) is BlockState.SHARED
    ledger.release([block])
    assert ledger.state(block) is BlockState.CACHED
    ledger.share([block])
    ledger.release([block])
    assert ledger.evict() == block
    assert ledger.state(block) is BlockState.FREE
    ledger.check_integrity()


def test_an_uncommitted_block_is_free_after_release() -> None:
    ledger = PoolLedger(2)
    table = ledger.allocate(2)
    commit(ledger, table[0], 1)
    ledger.release(table)
    assert (ledger.num_free, ledger.num_cached) == (1, 1)


def test_generations_rise_each_time_a_block_is_taken() -> None:
    ledger = PoolLedger(1)
    for expected in (1, 2, 3):
        table = ledger.allocate(1)
        assert ledger.generations[0] == expected
        ledger.release(table)


def test_a_commit_of_another_generation_changes_nothing() -> None:
    ledger = PoolLedger(1)
    ledger.release(ledger.allocate(1))
    [block] = ledger.allocate(1)
    assert not ledger.commit(block, 1, name(1), ROOT)
    assert ledger.state(block) is BlockState.PRIVATE
    assert ledger.commit(block, 2, name(1), ROOT)
    assert not ledger.commit(block, 2, name(1), ROOT)


def test_a_second_block_of_a_hash_becomes_free() -> None:
    ledger = PoolLedger(2)
    first, second = ledger.allocate(1), ledger.allocate(1)
    assert commit(ledger, first[0], 1)
    assert commit(ledger, second[0], 1)
    assert ledger.state(second[0]) is BlockState.SHARED
    ledger.release(second)
    assert ledger.state(second[0]) is BlockState.FREE
    ledger.check_integrity()


def test_private_blocks_are_not_shared() -> None:
    ledger = PoolLedger(1)
    table = ledger.allocate(1)
    with pytest.raises(AssertionError, match="PRIVATE"):
        ledger.share(table)


def test_what_is_available_beside_a_hit() -> None:
    ledger = PoolLedger(3)
    table = ledger.allocate(2)
    commit(ledger, table[0], 1)
    commit(ledger, table[1], 2, name(1))
    ledger.release(table)
    assert ledger.num_available == 3
    assert ledger.num_available_beside(table) == 1


def test_adopting_a_control_page() -> None:
    ledger = PoolLedger(4)
    entries = [
        PageEntry(2, name(2), name(1)),
        PageEntry(1, name(1), ROOT),
        PageEntry(3, name(1), ROOT),  # the same hash twice
    ]
    ledger.adopt([5, 6, 7, 8], entries)
    states = ledger.states()
    assert [s.name for s in states] == ["FREE", "CACHED", "CACHED", "FREE"]
    assert ledger.cache.longest([name(1), name(2)], 2) == [1, 2]
    assert ledger.allocate(4) == [0, 3, 2, 1]  # free ones first, then the leaf, then its parent
    assert ledger.generations == [6, 7, 8, 9]
    ledger.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_match_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(4, 24)
    ledger = PoolLedger(size)
    tables: list[list[int]] = []
    private: set[int] = set()
    cached: dict[int, int] = {}  # block -> its hash value, used or not
    generations = [0] * size
    parents: dict[int, bytes] = {}
    for value in range(1, 500):
        used = {block for table in tables for block in table}
        what = rng.random()
        if what < 0.35:
            count = rng.randint(1, 3)
            room = size - len(used)
            assert ledger.num_available == room, f"seed {seed}"
            if count > room:
                continue
            table = ledger.allocate(count)
            assert not set(table) & used, f"seed {seed}: gave out a block in use"
            for block in table:
                generations[block] += 1
                cached.pop(block, None)
            private |= set(table)
            tables.append(table)
        elif what < 0.6 and private:
            block = rng.choice(sorted(private))
            parents[value] = name(rng.choice([0, *sorted(cached.values())]))
            assert ledger.commit(block, generations[block], name(value), parents[value])
            private.discard(block)
            cached[block] = value
        elif what < 0.75:
            shareable = sorted(b for b in cached if ledger.state(b) is not BlockState.FREE)
            if shareable:
                table = rng.sample(shareable, rng.randint(1, len(shareable)))
                ledger.share(table)
                tables.append(table)
        elif tables:
            table = tables.pop(rng.randrange(len(tables)))
            ledger.release(table)
            private -= set(table)
        used = {block for table in tables for block in table}
        for block in range(size):
            if block in private:
                expected = BlockState.PRIVATE
            elif block in used:
                expected = BlockState.SHARED
            else:
                expected = BlockState.CACHED if block in cached else BlockState.FREE
            assert ledger.state(block) is expected, f"seed {seed}, block {block}"
        assert ledger.generations == generations, f"seed {seed}"
        assert ledger.num_used == len(used), f"seed {seed}"
        ledger.check_integrity()
