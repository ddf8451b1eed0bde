"""The cost model finds what work costs, and stays bounded."""

import random

import pytest

from diptych.scheduler.cost_model import WorkerCost


def test_finds_both_costs_of_a_noisy_worker() -> None:
    rng = random.Random(1)
    cost = WorkerCost()
    for _ in range(200):
        noise = rng.uniform(0.9, 1.1)
        if rng.random() < 0.5:
            cost.observe(4, 4 * 0.002 * noise, 0)
        else:
            cost.observe(1, (0.002 + 300 * 5e-5) * noise, 300)
    assert cost.step_s == pytest.approx(0.002, rel=0.1)
    assert cost.prefill_s == pytest.approx(5e-5, rel=0.1)


def test_follows_a_change() -> None:
    cost = WorkerCost()
    for seconds in [0.001] * 50 + [0.004] * 50:
        cost.observe(1, seconds, 0)
    assert cost.step_s == pytest.approx(0.004, rel=0.02)


@pytest.mark.parametrize("compute_s", [0.0, -1.0, float("inf"), float("nan"), 1e300])
def test_absurd_reports_change_nothing(compute_s: float) -> None:
    cost = WorkerCost()
    before = (cost.prefill_s, cost.step_s)
    cost.observe(1, compute_s, 10)
    cost.observe(1, compute_s, 0)
    cost.observe(0, 1.0, 10)
    assert (cost.prefill_s, cost.step_s) == before


def test_is_bounded() -> None:
    cost = WorkerCost()
    cost.observe(1, 1e5, 1)
    cost.observe(1, 1e5, 0)
    assert cost.prefill_s <= 0.1
    assert cost.step_s <= 5.0
    for _ in range(200):
        cost.observe(1, 1e-12, 10**9)
        cost.observe(1, 1e-12, 0)
    assert cost.prefill_s >= 1e-8
    assert cost.step_s >= 1e-5
