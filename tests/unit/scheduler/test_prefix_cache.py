"""The prefix cache against a plain dict of token prefixes."""

import random

import pytest

from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.types import BlockHash, pack_ids
from diptych.scheduler.prefix_cache import PrefixCache

ROOT = b"r" * 32


def chain(*blocks: int) -> list[BlockHash]:
    """Hashes of a prompt whose i-th block is filled with token `blocks[i]`."""
    return extend_chain(ROOT, pack_ids(t for token in blocks for t in [token] * 16), 16)


def insert(cache: PrefixCache, names: list[BlockHash], blocks: list[int]) -> list[bool]:
    parents = [ROOT, *names]
    return [cache.insert(b, name, parents[i]) for i, (b, name) in enumerate(zip(blocks, names))]


def test_longest_prefix_up_to_the_limit() -> None:
    cache = PrefixCache()
    names = chain(1, 2, 3)
    insert(cache, names, [10, 11, 12])
    assert cache.longest(names, 3) == [10, 11, 12]
    assert cache.longest(names, 2) == [10, 11]
    assert cache.longest(chain(1, 2, 4), 3) == [10, 11]
    assert cache.longest(chain(2, 2, 3), 3) == []


def test_the_first_block_of_a_hash_stays_the_one() -> None:
    cache = PrefixCache()
    names = chain(1, 2)
    assert insert(cache, names, [1, 2]) == [True, True]
    assert insert(cache, names, [3, 4]) == [False, False]
    assert cache.longest(names, 2) == [1, 2]
    assert 3 not in cache
    cache.check_integrity()


def test_leaves_go_first_then_their_parents() -> None:
    cache = PrefixCache()
    insert(cache, chain(1, 2, 3), [1, 2, 3])
    insert(cache, chain(1, 2, 4), [9, 9, 4])  # only the last one is new
    for block in (1, 2, 3, 4):  # parents parked before their children
        cache.park(block)
    assert [cache.evict() for _ in range(4)] == [3, 4, 2, 1]
    assert cache.num_entries == cache.num_parked == 0


def test_least_recently_used_first() -> None:
    cache = PrefixCache()
    for block in range(4):
        insert(cache, chain(block), [block])
        cache.park(block)
    cache.unpark(1)
    cache.park(1)
    assert [cache.evict() for _ in range(4)] == [0, 2, 3, 1]


def test_a_parked_parent_of_a_block_in_use_goes_when_nothing_else_can() -> None:
    cache = PrefixCache()
    insert(cache, chain(1, 2), [1, 2])
    cache.park(1)
    assert cache.evict() == 1
    cache.park(2)
    assert cache.evict() == 2
    cache.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_match_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    cache = PrefixCache()
    names_of: dict[int, tuple[int, ...]] = {}  # block -> its prefix of tokens
    parked: dict[int, int] = {}  # block -> when
    for now in range(400):
        what = rng.random()
        if what < 0.45:
            prompt = tuple(rng.randrange(2) for _ in range(rng.randint(1, 5)))
            limit = rng.randint(0, 5)
            by_prefix = {prefix: block for block, prefix in names_of.items()}
            expected = []
            for end in range(1, min(limit, len(prompt)) + 1):
                if prompt[:end] not in by_prefix:
                    break
                expected.append(by_prefix[prompt[:end]])
            assert cache.longest(chain(*prompt), limit) == expected, f"seed {seed}"
            names = chain(*prompt)
            for end in range(1, len(prompt) + 1):  # commit what is missing, as a sequence does
                if prompt[:end] in by_prefix:
                    continue
                block = next(b for b in range(500) if b not in names_of)
                parent = names[end - 2] if end > 1 else ROOT
                assert cache.insert(block, names[end - 1], parent)
                names_of[block] = prompt[:end]
        elif what < 0.7 and len(names_of) > len(parked):
            block = rng.choice([b for b in names_of if b not in parked])
            cache.park(block)
            parked[block] = now
        elif what < 0.8 and parked:
            block = rng.choice(list(parked))
            cache.unpark(block)
            del parked[block]
        elif parked:
            with_child = {prefix[:-1] for prefix in names_of.values()}
            leaves = [b for b in parked if names_of[b] not in with_child]
            expected_block = min(leaves or parked, key=lambda b: parked[b])
            assert cache.evict() == expected_block, f"seed {seed}"
            del names_of[expected_block], parked[expected_block]
        cache.check_integrity()
        assert cache.num_entries == len(names_of), f"seed {seed}"


def test_stale_entries_do_not_pile_up() -> None:
    cache = PrefixCache()
    insert(cache, chain(1), [1])
    for _ in range(1000):
        cache.park(1)
        cache.unpark(1)
    assert len(cache._leaves) <= 2 * 1 + 64
