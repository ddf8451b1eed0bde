"""A slice of the simulation: many seeds, every invariant after every event."""

import os
import subprocess
import sys

import pytest

from tests.sim.scenario import FEATURES, generate
from tests.sim.shrink import shrink
from tests.sim.simulation import Outcome, simulate

EVENTS = 200_000
SLICES = 4
FIRST_SEED = 1


def _fail(outcome: Outcome) -> None:
    seed = outcome.scenario.seed
    small = shrink(outcome.scenario, outcome)
    pytest.fail(
        f"seed {seed}, event {outcome.num_events}: {outcome.violation}\n"
        f"again: python -m tests.sim --seed {seed} --replay\n"
        f"small: {small.command(seed, '')}"
    )


@pytest.mark.parametrize("part", range(SLICES))
def test_slice(part: int) -> None:
    """200,000 events in all; each part has its own seeds."""
    events, seed = 0, FIRST_SEED + part * 1_000_000
    while events < EVENTS // SLICES:
        outcome = simulate(generate(seed))
        events += outcome.num_events
        if outcome.violation is not None:
            _fail(outcome)
        seed += 1


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_alone(feature: str) -> None:
    """A disturbance that comes alone shows what it breaks."""
    for seed in range(3):
        outcome = simulate(generate(seed, frozenset({feature})))
        assert outcome.violation is None, f"seed {seed} with {feature}: {outcome.violation}"


def test_undisturbed_requests_complete() -> None:
    """Without faults, limits or impatient clients every request that fits is answered in full."""
    for seed in range(10):
        outcome = simulate(generate(seed, frozenset({"prefix", "choices"})))
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        assert set(outcome.ends) <= {"complete", "InvalidRequestError"}, f"seed {seed}"


def test_a_run_is_a_function_of_its_seed() -> None:
    """Also in another process, where strings hash differently."""
    seeds = range(40, 46)
    here = [simulate(generate(seed)).digest for seed in seeds]
    code = (
        "from tests.sim.scenario import generate\n"
        "from tests.sim.simulation import simulate\n"
        f"print([simulate(generate(seed)).digest for seed in {list(seeds)}])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(here)
