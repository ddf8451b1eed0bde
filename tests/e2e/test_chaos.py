"""A short slice of `bench.chaos` and `bench.aborts`: nothing fails, is wrong, or is left."""

import argparse
import asyncio
from pathlib import Path

import pytest

from bench import aborts, chaos
from bench.models import write_model

SEED = 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "flags",
    [["--kills", "12"], ["--kills", "12", "--transfer", "tcp"], ["--kills", "0", "--stops", "2"]],
    ids=["kills", "kills, separate pools", "stops"],
)
def test_disturbed_workers_and_schedulers_are_not_noticed(tmp_path: Path, flags: list[str]) -> None:
    args = chaos.parse(["--users", "6", "--seed", str(SEED), *flags])
    result = asyncio.run(chaos.run(write_model(tmp_path, "tiny"), args))
    assert chaos.clean(result), result
    assert result["requests_completed"], result


@pytest.mark.parametrize(
    ("inline", "transfer"), [(True, None), (False, None), (False, "shm"), (False, "tcp")]
)
def test_aborts_at_random_moments_leave_nothing(
    tmp_path: Path, inline: bool, transfer: str | None
) -> None:
    args = argparse.Namespace(
        aborts=150, users=16, num_blocks=512, inline=inline, transfer=transfer, seed=SEED
    )
    result = asyncio.run(aborts.run(write_model(tmp_path, "tiny"), args))
    assert result["blocks_leaked"] == 0, result
    assert result["running"] == 0, result
    assert result["waiting"] == 0, result
