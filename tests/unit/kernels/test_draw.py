"""Drawn tokens: the C++ backend against the reference, and that against the definition."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from diptych.kernels import DRAW_SPAN, library, load
from diptych.kernels.philox import uniforms

Keys = NDArray[np.uint64]  # [R, 3]


def _weights(rng: random.Random, rows: int, vocab: int) -> NDArray[np.float64]:
    """Sharp and flat rows, with tokens that are ruled out."""
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    weights = np.exp(numbers.normal(0, rng.choice([0.1, 3.0, 30.0]), (rows, vocab)))
    weights[numbers.random((rows, vocab)) < rng.choice([0.0, 0.5, 0.99])] = 0.0
    weights[np.arange(rows), numbers.integers(0, vocab, rows)] = 1.0
    return weights


def _spans(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    spans = range(0, weights.shape[1], DRAW_SPAN)
    sums: NDArray[np.float64] = np.add.reduceat(weights, spans, axis=1).cumsum(axis=1)
    return sums


def _keys(rng: random.Random, rows: int) -> Keys:
    ends = (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
    keys = [
        (rng.choice([*ends, rng.randrange(2**64)]), rng.randrange(128), rng.choice([0, row, 2**40]))
        for row in range(rows)
    ]
    return np.array(keys, dtype=np.uint64)


@pytest.mark.skipif(library.find() is None, reason="the C++ library is not built")
@pytest.mark.parametrize("vocab", [1, 40, 255, 256, 257, 609, 5000])
@pytest.mark.parametrize("seed", range(4))
def test_backends_draw_the_same_tokens(vocab: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        rows = rng.randint(1, 40)
        weights, keys = _weights(rng, rows, vocab), _keys(rng, rows)
        drawn = [load(name).draw(weights, _spans(weights), keys) for name in ("cpp", "reference")]
        assert drawn[0] == drawn[1], f"seed {seed}"
        # Sums that promise more than there is, as rounding may: the last token that can be.
        much = _spans(weights) * 1.5
        drawn = [load(name).draw(weights, much, keys) for name in ("cpp", "reference")]
        assert drawn[0] == drawn[1], f"seed {seed}"
        assert all(weights[row, token] > 0 for row, token in enumerate(drawn[0]))


@pytest.mark.parametrize("vocab", [40, 257, 1000])
def test_the_token_is_the_first_beyond_the_number(vocab: int) -> None:
    rng = random.Random(vocab)
    weights, keys = _weights(rng, 60, vocab), _keys(rng, 60)
    numbers = uniforms(*keys.T.tolist())
    for row, token in enumerate(load().draw(weights, _spans(weights), keys)):
        share = np.cumsum(weights[row]) / weights[row].sum()
        assert share[token] > numbers[row] - 1e-12
        assert token == 0 or share[token - 1] <= numbers[row] + 1e-12
        assert weights[row, token] > 0


@pytest.mark.skipif(library.find() is None, reason="the C++ library is not built")
def test_wrong_shapes_are_refused() -> None:
    weights = np.ones((2, 300))
    kernels = load("cpp")
    keys = _keys(random.Random(0), 2)
    with pytest.raises(AssertionError):
        kernels.draw(weights, np.ones((2, 1)), keys)
    with pytest.raises(AssertionError):
        kernels.draw(weights, _spans(weights), keys[:1])
    with pytest.raises(AssertionError):
        kernels.draw(weights, _spans(weights), keys.astype(np.int64))  # type: ignore[arg-type]
