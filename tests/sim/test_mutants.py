"""The simulator finds every bug it is given: a measure of the simulator itself."""

import pytest

from tests.sim.mutants.registry import all_mutants, mutated
from tests.sim.scenario import generate
from tests.sim.shrink import shrink
from tests.sim.simulation import simulate

EVENTS_MAX = 150_000
"""A mutant that is not found by then means a missing check."""


def test_there_are_enough() -> None:
    assert len(all_mutants()) >= 20


@pytest.mark.parametrize("name", sorted(all_mutants()))
def test_found(name: str) -> None:
    events = seed = 0
    with mutated(name):
        while events < EVENTS_MAX:
            outcome = simulate(generate(seed, all_mutants()[name].features))
            events += outcome.num_events
            if outcome.violation is not None:
                return
            seed += 1
    pytest.fail(f"{name} survives {events} events in {seed} scenarios")


def test_a_mutant_leaves_no_trace() -> None:
    """After its context the product is whole again."""
    for name in all_mutants():
        with mutated(name):
            pass
    assert simulate(generate(0)).violation is None


def test_a_failure_shrinks_and_replays() -> None:
    """The shrunk scenario fails in the same way, and again when it is run again."""
    with mutated("abort_leaks"):
        seed = 0
        while (outcome := simulate(generate(seed))).violation is None:
            seed += 1
        small = shrink(outcome.scenario, outcome)
        assert len(small.requests) < len(outcome.scenario.requests)
        kept = generate(seed).keep(set(small.requests), set(small.faults))
        assert simulate(kept).digest == small.outcome.digest
    assert simulate(kept).violation is None
