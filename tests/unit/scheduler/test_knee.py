"""When a step has enough prompt tokens, from what steps cost."""

import random

import pytest

from diptych.scheduler.knee import ENOUGH, GUESS_TOKENS, TOKENS_MIN, Knee


@pytest.mark.parametrize(("base_s", "row_s"), [(16e-3, 0.5e-3), (2e-3, 4e-6), (1e-2, 5e-5)])
def test_it_follows_the_costs_of_steps(base_s: float, row_s: float) -> None:
    rng, knee = random.Random(3), Knee()
    for _ in range(200):
        rows = rng.choice((1, 8, 64, 300, 512))
        knee.observe(rows, (base_s + rows * row_s) * rng.uniform(0.99, 1.01))
    assert knee.tokens() == pytest.approx(ENOUGH * base_s / row_s, rel=0.25)


def test_it_guesses_until_steps_of_different_sizes_were_seen() -> None:
    knee = Knee()
    assert knee.tokens() == GUESS_TOKENS
    for _ in range(100):
        knee.observe(512, 0.3)
        assert knee.tokens() == GUESS_TOKENS


def test_costs_that_make_no_line_are_survived() -> None:
    for times in ((0.3, 0.2), (1e-4, 0.3), (0.0, float("nan"))):
        knee = Knee()
        for step in range(50):
            knee.observe((16, 512)[step % 2], times[step % 2])
        assert TOKENS_MIN <= knee.tokens() <= 1_000_000


def test_old_steps_are_forgotten() -> None:
    knee = Knee()
    for base_s in (4e-3, 4e-2):
        for step in range(500):
            rows = (8, 256)[step % 2]
            knee.observe(rows, base_s + rows * 1e-4)
    assert knee.tokens() == pytest.approx(1600, rel=0.05)
