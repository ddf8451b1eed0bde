"""Drawn tokens: the C++ backend against the reference, and that against the definition."""

import math
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diptych.kernels import DRAW_SPAN, library, load
from diptych.kernels.philox import uniforms
from tests.unit.engine.test_bitwise import levels

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


def _drawn_from_weights(
    logits: NDArray[np.float32], temperatures: NDArray[np.float64], keys: Keys
) -> list[int]:
    """In float64, as `Kernels.draw_plain` says."""
    weights = np.subtract(logits, logits.max(axis=1, keepdims=True), dtype=np.float64)
    with np.errstate(over="ignore"):
        weights = np.exp(weights / temperatures)
    return load("cpp").draw(weights, _spans(weights), keys)


@pytest.mark.skipif(library.find() is None, reason="the C++ library is not built")
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("vocab", [1, 40, 64, 65, 609, 2048, 5000])
def test_plain_draws_are_those_from_weights(level: str, vocab: int) -> None:
    rng = random.Random(vocab)
    numbers = np.random.default_rng(vocab)
    kernels = load("cpp", level)
    unsure = 0
    for turn in range(40):
        kernels.set_num_threads(1 + turn % 2)
        rows, total = rng.randint(1, 40), 40
        scale = rng.choice([0.0, 0.3, 3.0, 1e4])
        logits = numbers.normal(0, scale, (total, vocab)).astype(np.float32)
        logits[numbers.random((total, vocab)) < rng.choice([0.0, 0.5])] = -np.inf
        logits[:, rng.randrange(vocab)] = 1.0
        index = np.array(rng.sample(range(total), rows), dtype=np.int32)
        temperatures = numbers.choice([1e-310, 1e-6, 0.3, 1.0, 1.7, 100.0], (rows, 1))
        keys = _keys(rng, rows)
        drawn = kernels.draw_plain(torch.from_numpy(logits), index, temperatures, keys)
        wanted = _drawn_from_weights(logits[index], temperatures, keys)
        unsure += drawn.count(-1)
        assert all(a in (-1, b) for a, b in zip(drawn, wanted, strict=True)), f"turn {turn}"
    kernels.set_num_threads(1)
    assert unsure <= 1


@pytest.mark.skipif(library.find() is None, reason="the C++ library is not built")
@pytest.mark.parametrize("level", levels())
def test_a_number_at_the_edge_of_a_token_leaves_doubt(level: str) -> None:
    kernels, logits = load("cpp", level), torch.tensor([[0.0, -1.0]])
    for seed in range(50):
        keys = np.array([[seed, 0, 7]], dtype=np.uint64)
        [number] = uniforms([seed], [0], [7])
        for shift, wanted in ((0.0, -1), (1e-13, -1), (-1e-13, -1), (1e-9, 1), (-1e-9, 0)):
            edge = number * (1.0 - shift)  # the share of token 0
            temperature = 1.0 / -math.log(1.0 / edge - 1.0) if edge > 0.5 else None
            if temperature is not None:
                at = np.array([[temperature]])
                index = np.zeros(1, dtype=np.int32)
                assert kernels.draw_plain(logits, index, at, keys) == [wanted], f"seed {seed}"


@pytest.mark.skipif(library.find() is None, reason="the C++ library is not built")
def test_rows_that_are_not_finite_are_left() -> None:
    logits = torch.tensor([[0.0, math.nan], [math.inf, 0.0], [-math.inf] * 2, [0.0, -math.inf]])
    index, at = np.arange(4, dtype=np.int32), np.ones((4, 1))
    assert load("cpp").draw_plain(logits, index, at, _keys(random.Random(0), 4)) == [-1, -1, -1, 0]


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
    logits, index, at = torch.ones(2, 300), np.arange(2, dtype=np.int32), np.ones((2, 1))
    for bad in (index + 1, index - 1):
        with pytest.raises(AssertionError):
            kernels.draw_plain(logits, bad, at, keys)
    with pytest.raises(AssertionError):
        kernels.draw_plain(logits, index, at * 0.0, keys)
    with pytest.raises(AssertionError):
        kernels.draw_plain(logits, index, at[:1], keys)
