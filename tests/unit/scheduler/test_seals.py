"""Seals that come before their assignment, or after their sequence was given back."""

from diptych.engine.core.messages import Seal
from diptych.engine.core.request import SeqRef
from diptych.scheduler.seals import HELD_MAX, Seals


def seal_of(name: str, epoch: int = 1) -> Seal:
    return Seal(epoch, 0, 0, 0, SeqRef(name, 0, 0), 16, 7, None)


def test_a_seal_is_claimed_once() -> None:
    seals = Seals()
    seals.hold(seal_of("a"))
    assert seals.claim(SeqRef("a", 0, 1)) is None
    assert seals.claim(SeqRef("a", 0, 0)) == seal_of("a")
    assert seals.claim(SeqRef("a", 0, 0)) is None


def test_a_seal_after_its_revoke_is_dropped() -> None:
    seals = Seals()
    seals.void(SeqRef("a", 0, 0))
    seals.hold(seal_of("a"))
    assert seals.claim(SeqRef("a", 0, 0)) is None


def test_the_oldest_goes_first() -> None:
    seals = Seals()
    for i in range(HELD_MAX + 1):
        seals.hold(seal_of(str(i)))
    assert seals.claim(SeqRef("0", 0, 0)) is None
    assert seals.claim(SeqRef("1", 0, 0)) is not None


def test_a_new_scheduler_forgets_older_seals_only() -> None:
    seals = Seals()
    seals.hold(seal_of("old", 1))
    seals.hold(seal_of("new", 2))
    seals.forget_before(2)
    assert seals.claim(SeqRef("old", 0, 0)) is None
    assert seals.claim(SeqRef("new", 0, 0)) is not None
