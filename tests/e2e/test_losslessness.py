"""A pairwise cover of the losslessness matrix on real processes; the whole product is a bench."""

import asyncio
from dataclasses import astuple
from itertools import combinations
from math import prod
from pathlib import Path

import pytest

from bench.losslessness import AXES, all_cells, pairwise_cells, run_cells
from bench.models import write_model

SEED = 20


def test_the_cover_holds_every_pair() -> None:
    cells = pairwise_cells(SEED)
    assert len(cells) <= 50
    want = {
        (i, j, a, b)
        for (i, left), (j, right) in combinations(enumerate(AXES.values()), 2)
        for a in left
        for b in right
    }
    have = {
        (i, j, values[i], values[j])
        for values in map(astuple, cells)
        for i, j in combinations(range(len(values)), 2)
    }
    assert have == want
    assert len(set(all_cells())) == prod(map(len, AXES.values()))


@pytest.mark.timeout(450)
def test_tokens_and_logprobs_are_equal_in_every_cell(tmp_path: Path) -> None:
    rows = asyncio.run(run_cells(pairwise_cells(SEED), write_model(tmp_path, "tiny")))
    bad = [f"{outcome}: {cell}: {detail}" for cell, outcome, detail in rows if outcome != "ok"]
    assert not bad, f"seed {SEED}\n" + "\n".join(bad)
