"""Two pools that do not go together are not tried again while those two workers live."""

from diptych.engine.core.messages import Joined, PairStats, Refused, Stats, WorkerDown, WorkerUp
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import DownCause, Role
from diptych.scheduler.scheduler import STATS_PERIOD_S
from tests.unit.scheduler.test_far import PROMPT, D, Far, P
from tests.unit.scheduler.world import EPOCH

REASON = "refused: its blocks have another layout"


def refused(far: Far) -> SeqRef:
    """A first request whose decode side may not read what its prefill side computes."""
    ref = far.submit("a", PROMPT)
    assert far.assigned[D, ref].role is Role.DECODE
    far.progress(D, refused=[Refused(0, (P, 1), REASON)], released=[ref])
    far.progress(P, released=[ref])
    return ref


def pairs(far: Far) -> list[PairStats]:
    commands = far.scheduler.step([], far.scheduler._now + STATS_PERIOD_S)
    messages = [getattr(command, "message", None) for command in commands]
    return [pair for stats in messages if isinstance(stats, Stats) for pair in stats.pairs]


def test_a_refused_pair_is_not_chosen_again() -> None:
    far = Far()
    refused(far)
    for name in ("b", "c"):
        ref = far.submit(name, [*name.encode(), *PROMPT])
        assert far.assigned[D, ref].role is Role.LOCAL
        assert (P, ref) not in far.assigned
    shown = [(p.source, p.pool, p.refused) for p in pairs(far)]
    assert shown == [(0, 1, REASON), (1, 0, REASON)]


def test_a_prefix_is_not_asked_for_where_it_would_be_refused() -> None:
    """What only the other pool has cached is computed again."""
    far = Far()
    ref = refused(far)
    again = far.submit("a", PROMPT, attempt=1)
    assert again != ref
    far.progress(D, committed=far.full(D, again, 3), finished=[again])
    ref = far.submit("b", [*PROMPT, *range(10)])
    assert far.assigned[D, ref].num_computed == 48
    assert far.assigned[D, ref].prefix is None


def test_whoever_comes_in_the_place_of_one_of_the_two_is_tried() -> None:
    for restarted in (P, D):
        far = Far()
        refused(far)
        far.step(WorkerDown(restarted, 1, DownCause.KILLED))
        up = WorkerUp(restarted, 2, restarted, 100 if restarted == P else 0)
        far.step(up)
        far.step(Joined(EPOCH, restarted, 2))
        ref = far.submit("b", PROMPT)
        assert far.assigned[D, ref].role is Role.DECODE, f"worker {restarted} restarted"
        assert all(pair.refused is None for pair in pairs(far))


def test_what_an_older_incarnation_refused_is_nothing() -> None:
    far = Far()
    far.step(WorkerDown(P, 1, DownCause.KILLED), WorkerUp(P, 2, 0, 100))
    far.step(Joined(EPOCH, P, 2))
    far.progress(D, refused=[Refused(0, (P, 1), REASON)])
    ref = far.submit("b", PROMPT)
    assert far.assigned[D, ref].role is Role.DECODE
