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
            cost.observe(4, 4 * 0.002 * noise, 0, 8)
        else:
            cost.observe(1, (0.002 + 300 * 5e-5) * noise, 300, 2)
    assert cost.step_s == pytest.approx(0.002, rel=0.1)
    assert cost.prefill_s == pytest.approx(5e-5, rel=0.1)


def test_follows_a_change() -> None:
    cost = WorkerCost()
    for seconds in [0.001] * 50 + [0.004] * 50:
        cost.observe(1, seconds, 0, 1)
    assert cost.step_s == pytest.approx(0.004, rel=0.02)


def test_follows_a_change_that_only_shows_in_mixed_steps() -> None:
    cost = WorkerCost()
    cost.observe(1, 0.002, 0, 4)
    cost.observe(1, 100 * 5e-5, 100, 0)
    for _ in range(60):
        for tokens in (16, 300):
            cost.observe(1, 2 * (0.002 + tokens * 5e-5), tokens, 4)
    assert cost.step_s == pytest.approx(0.004, rel=0.02)
    assert cost.prefill_s == pytest.approx(1e-4, rel=0.02)


def test_steps_with_little_prefill_say_little_about_it() -> None:
    cost, other = WorkerCost(), WorkerCost()
    other.observe(1, 0.008, 0, 4)
    cost.observe(1, 1000 * 2e-5, 1000, 0)
    cost.guess_like(other)
    for _ in range(100):
        cost.observe(1, 0.0095 + 16 * 2e-5, 16, 4)
    assert cost.prefill_s == pytest.approx(2e-5, rel=0.1)
    assert cost.step_s == pytest.approx(0.0095, rel=0.02)


def test_the_first_mixed_step_is_not_charged_to_prefill_alone() -> None:
    cost = WorkerCost()
    cost.observe(1, 1000 * 2e-5, 1000, 0)
    cost.observe(1, 0.008 + 16 * 2e-5, 16, 4)
    assert cost.prefill_s == pytest.approx(2e-5)
    assert cost.step_s == pytest.approx(0.008)
    assert cost.known == (True, False)


@pytest.mark.parametrize(("base_s", "row_s"), [(2.5e-3, 2.5e-4), (8e-3, 2e-5), (1e-4, 1e-3)])
def test_tells_what_a_decode_adds_from_what_every_step_costs(base_s: float, row_s: float) -> None:
    rng = random.Random(3)
    cost = WorkerCost()
    for _ in range(300):
        rows = rng.randint(1, 12)
        cost.observe(4, 4 * (base_s + row_s * rows) * rng.uniform(0.97, 1.03), 0, 4 * rows)
    assert cost.base_s + 6 * cost.row_s == pytest.approx(base_s + 6 * row_s, rel=0.1)
    assert cost.row_s == pytest.approx(row_s, rel=0.4, abs=3e-5)


def test_a_decode_is_guessed_to_cost_a_token_of_a_prompt() -> None:
    cost = WorkerCost()
    cost.observe(1, 3e-4 * 100, 100, 0)
    cost.observe(1, 3e-3, 0, 1)
    assert cost.row_s == pytest.approx(3e-4)
    assert cost.base_s == pytest.approx(2.7e-3)


def test_an_untried_worker_is_guessed_to_be_like_a_tried_one() -> None:
    tried, untried, half = WorkerCost(), WorkerCost(), WorkerCost()
    tried.observe(1, 0.002, 0, 4)
    tried.observe(1, 0.01, 1000, 0)
    half.observe(1, 0.5, 0, 4)
    for cost in (untried, half):
        cost.guess_like(tried)
    assert (untried.prefill_s, untried.step_s) == pytest.approx((1e-5, 0.002))
    assert (half.prefill_s, half.step_s) == pytest.approx((1e-5, 0.5))
    assert untried.known == (False, False)
    untried.observe(1, 0.02, 1000, 0)
    assert untried.prefill_s == pytest.approx(2e-5), "its own first report replaces the guess"


@pytest.mark.parametrize("compute_s", [0.0, -1.0, float("inf"), float("nan"), 1e300])
def test_absurd_reports_change_nothing(compute_s: float) -> None:
    cost = WorkerCost()
    before = (cost.prefill_s, cost.step_s)
    cost.observe(1, compute_s, 10, 0)
    cost.observe(1, compute_s, 10, 3)
    cost.observe(1, compute_s, 0, 3)
    cost.observe(0, 1.0, 10, 3)
    assert (cost.prefill_s, cost.step_s) == before


def test_is_bounded() -> None:
    cost = WorkerCost()
    cost.observe(1, 1e5, 1, 0)
    cost.observe(1, 1e5, 0, 1)
    assert cost.prefill_s <= 0.1
    assert cost.step_s <= 5.0
    for _ in range(200):
        cost.observe(1, 1e-12, 10**9, 0)
        cost.observe(1, 1e-12, 10**9, 1)
        cost.observe(1, 1e-12, 0, 1)
    assert cost.prefill_s >= 1e-8
    assert cost.step_s >= 1e-5
