"""The controller of roles against every fixed split, in virtual time: the real machines under a
load whose phases change (see bench/roles.py for the same on a real machine)."""

import pytest

from diptych.engine.core.config import BatchOptions, SchedulerOptions
from tests.unit.scheduler.timed import Arrival, Costs, Run, Timed, wave

CPU = Costs(base_s=2.5e-3, decode_s=2.5e-4, prefill_s=3e-4)
TTFT_S = 6 * 512 * CPU.prefill_s
ITL_S = 1.5 * (CPU.base_s + 12 * CPU.decode_s)


def square(workers: int, load: float, seed: int, phase_s: float = 7.0) -> list[Arrival]:
    """Long prompts with short answers, then short prompts with long answers, twice."""
    prefill = load * workers / (512 * CPU.prefill_s)
    decode = load * workers * 12 / (96 * ITL_S / 1.5)
    return wave([(phase_s, prefill, 512, 16), (phase_s, decode, 16, 96)], 2, seed)


def play(
    dials: list[int],
    arrivals: list[Arrival],
    slo_s: tuple[float, float],
    *,
    steers: bool = False,
    paced: bool = False,
    costs: Costs = CPU,
) -> Run:
    ttft_s, itl_s = slo_s
    options = SchedulerOptions()
    if steers:
        options = SchedulerOptions(ttft_slo_s=ttft_s, itl_slo_s=itl_s)
    batch = BatchOptions(max_num_batched_tokens=256, itl_slo_s=itl_s if steers or paced else None)
    run = Timed(dials, costs, options, batch).play(arrivals)
    assert len(run.answers) == len(arrivals)
    assert all(len(each.times_s) == each.arrival.answer for each in run.answers), "none is lost"
    return run


def best_fixed(workers: int, arrivals: list[Arrival], slo_s: tuple[float, float]) -> float:
    """Of every split, and of all workers doing both with and without steps that keep the target."""
    runs = [play([100] * n + [0] * (workers - n), arrivals, slo_s) for n in range(1, workers)]
    runs += [play([50] * workers, arrivals, slo_s, paced=paced) for paced in (False, True)]
    return max(run.attained(*slo_s) for run in runs)


def middle(workers: int) -> list[int]:
    return [100] * (workers // 2) + [0] * (workers - workers // 2)


@pytest.mark.parametrize(
    ("workers", "load", "seed"),
    [(2, 0.45, 1), (2, 0.65, 1), (2, 0.65, 4), (3, 0.6, 2), (4, 0.6, 1)],
)
def test_as_good_as_the_best_fixed_split_but_for_the_first_second(
    workers: int, load: float, seed: int
) -> None:
    arrivals = square(workers, load, seed)
    slo_s = (TTFT_S, ITL_S)
    moving = play(middle(workers), arrivals, slo_s, steers=True)
    assert moving.attained(*slo_s) >= best_fixed(workers, arrivals, slo_s) - 0.01
    apart = play(middle(workers), arrivals, slo_s).attained(*slo_s)
    assert moving.attained(*slo_s) > apart + 0.02, "the load is one that the first roles fail"


TIGHT = [
    (3, 0.45, 1.15, 1),
    (3, 0.65, 1.15, 1),
    (3, 0.65, 1.15, 5),
    (3, 0.65, 1.3, 5),
    (4, 0.45, 1.15, 1),
    (4, 0.65, 1.15, 5),
    (4, 0.65, 1.3, 1),
]
"""(workers, load, target between tokens over a full step, seed)."""


def test_near_the_best_fixed_split_where_steps_barely_meet_their_target() -> None:
    """No split suits both phases, nobody knows which comes next, and a move that comes late costs
    what it was to gain."""
    behind = {}
    for case in TIGHT:
        workers, load, of_step, seed = case
        arrivals, slo_s = square(workers, load, seed), (TTFT_S, of_step * ITL_S / 1.5)
        moving = play(middle(workers), arrivals, slo_s, steers=True).attained(*slo_s)
        behind[case] = best_fixed(workers, arrivals, slo_s) - moving
    assert max(behind.values()) < 0.15, behind
    assert sum(behind.values()) / len(behind) < 0.05, behind


def test_separate_roles_stay_where_they_are_better() -> None:
    """Steps that only just meet their target leave a worker no time for prompts beside decodes."""
    arrivals = wave([(20.0, 3.0, 800, 60)])
    slo_s = (1.0, 3.4e-3)
    apart = play([100, 0], arrivals, slo_s).attained(*slo_s)
    both = play([50, 50], arrivals, slo_s, paced=True).attained(*slo_s)
    assert apart > both + 0.2
    assert play([100, 0], arrivals, slo_s, steers=True).attained(*slo_s) >= apart - 0.02
    assert play([50, 50], arrivals, slo_s, steers=True).attained(*slo_s) > both + 0.1


def test_it_does_not_move_for_ever_under_a_steady_load() -> None:
    arrivals = wave([(20.0, 5.0, 512, 40)])
    run = play([100, 0], arrivals, (TTFT_S, ITL_S), steers=True)
    assert len(run.dials) <= 4


def test_the_same_arguments_give_the_same_run() -> None:
    arrivals = square(2, 0.65, 3, 3.0)
    first, again = (play([100, 0], arrivals, (TTFT_S, ITL_S), steers=True) for _ in range(2))
    assert first.dials == again.dials
    assert [a.times_s for a in first.answers] == [a.times_s for a in again.answers]
