"""Makes a failing scenario small: drops requests and faults while it still fails the same way."""

from dataclasses import dataclass

from tests.sim.scenario import Scenario
from tests.sim.simulation import Outcome, simulate

RUNS_MAX = 150


@dataclass(slots=True)
class Shrunk:
    """The smallest failing part found, as the indices to keep of the seed's scenario."""

    requests: list[int]
    faults: list[int]
    outcome: Outcome

    def command(self, seed: int, features: str) -> str:
        """How to see it again."""
        keep = ",".join(map(str, self.requests)) or "none"
        faults = ",".join(map(str, self.faults)) or "none"
        return (
            f"python -m tests.sim --seed {seed}{features} --keep {keep} --faults {faults} --replay"
        )


def shrink(scenario: Scenario, outcome: Outcome) -> Shrunk:
    """Halves, then single entries, at most `RUNS_MAX` runs."""
    runs = 0

    def fails(requests: list[int], faults: list[int]) -> Outcome | None:
        nonlocal runs
        runs += 1
        found = simulate(scenario.keep(set(requests), set(faults)))
        return found if found.violation is not None and found.kind == outcome.kind else None

    requests = [spec.index for spec in scenario.requests]
    faults = list(range(len(scenario.faults)))
    best = outcome
    for which in (1, 0, 1, 0):
        size = max(1, len((requests, faults)[which]) // 2)
        while size and runs < RUNS_MAX:
            start = 0
            while start < len((requests, faults)[which]) and runs < RUNS_MAX:
                parts = [list(requests), list(faults)]
                del parts[which][start : start + size]
                found = fails(parts[0], parts[1])
                if found is None:
                    start += size
                else:
                    requests, faults, best = parts[0], parts[1], found
            size //= 2
    return Shrunk(requests, faults, best)
