"""What a split of workers promises: more demand is never served better, shares stay shares."""

from itertools import pairwise, product

import pytest

from diptych.scheduler.forecast import Costs, Demand, Forecast, Split, forecast

COSTS = Costs(prefill_s=2e-4, base_s=2e-3, row_s=2e-4)
SLO_S = (1.0, 10e-3)
SPLITS = [Split(1, 0, 1), Split(0, 2, 0), Split(1, 1, 0), Split(0, 1, 1), Split(3, 2, 3)]


def of(split: Split, prefill: float, decode: float, queued: float = 0.0) -> Forecast:
    return forecast(split, Demand(prefill, 1000.0, queued, decode), COSTS, SLO_S, 64)


@pytest.mark.parametrize("split", SPLITS)
def test_more_demand_is_never_served_better(split: Split) -> None:
    rates = (0.0, 1.0, 100.0, 1000.0, 3000.0, 10000.0, 1e6)
    for fixed in rates:
        for less, more in pairwise(rates):
            assert of(split, less, fixed).share >= of(split, more, fixed).share - 1e-9
            assert of(split, fixed, less).share >= of(split, fixed, more).share - 1e-9
            assert of(split, fixed, fixed, less).share >= of(split, fixed, fixed, more).share


@pytest.mark.parametrize("split", SPLITS)
def test_shares_are_shares_and_scores_are_numbers(split: Split) -> None:
    for prefill, decode, queued in product((0.0, 1.0, 1e3, 1e9), repeat=3):
        found = of(split, prefill, decode, queued)
        assert 0.0 <= found.share <= 1.0
        assert found.stress >= 0.0
        assert -1.0 < found.score <= 1.0


def test_no_demand_is_served_whole() -> None:
    for split in SPLITS:
        assert of(split, 0.0, 0.0).share == 1.0


def test_one_more_worker_of_a_side_helps_that_side() -> None:
    assert of(Split(2, 0, 1), 4500.0, 100.0).share > of(Split(1, 0, 1), 4500.0, 100.0).share + 0.1
    assert of(Split(1, 0, 2), 100.0, 4500.0).share > of(Split(1, 0, 1), 100.0, 4500.0).share + 0.1


def test_a_prompt_that_takes_longer_than_its_target_is_late_anywhere() -> None:
    demand = Demand(10.0, 6000.0, 0.0, 0.0)  # 1.2 s of a whole worker
    for split in SPLITS:
        assert forecast(split, demand, COSTS, SLO_S, 64).share == 0.0


def test_a_step_beyond_the_target_is_late_anywhere() -> None:
    demand = Demand(10.0, 10.0, 0.0, 50.0)
    for split in SPLITS:
        assert forecast(split, demand, COSTS, (1.0, 2e-3), 64).share == 0.0


def test_seats_bound_what_a_worker_decodes() -> None:
    demand = Demand(10.0, 10.0, 0.0, 2500.0)
    few, many = (forecast(Split(1, 0, 1), demand, COSTS, SLO_S, n).share for n in (4, 64))
    assert few < 0.2 < 0.9 < many


def test_both_roles_must_be_covered() -> None:
    assert Split(0, 1, 0).covers
    assert not Split(2, 0, 0).covers
    assert not Split(0, 0, 2).covers
