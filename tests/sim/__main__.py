"""`python -m tests.sim --events 2000000`: many seeds; a failure prints how to see it again."""

import argparse
import sys
import time
from pathlib import Path

from bench.record import write
from tests.sim.mutants.registry import all_mutants, mutated
from tests.sim.scenario import FEATURES, Scenario, generate
from tests.sim.shrink import shrink
from tests.sim.simulation import Outcome, simulate


def _numbers(text: str | None) -> set[int] | None:
    if text is None:
        return None
    return set() if text == "none" else {int(part) for part in text.split(",")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--events", type=int, default=200_000, help="stop after this many")
    parser.add_argument("--seed", type=int, default=0, help="the first seed, or the one to replay")
    parser.add_argument(
        "--mutant", choices=sorted(all_mutants()), help="break the product this way"
    )
    parser.add_argument("--features", help=f"exactly these: {','.join(FEATURES)}")
    parser.add_argument("--replay", action="store_true", help="one seed, with its last events")
    parser.add_argument("--keep", help="indices of the requests to keep, or none")
    parser.add_argument("--faults", help="places of the faults to keep, or none")
    parser.add_argument("--trace", type=int, default=60, help="events to print of a failure")
    parser.add_argument("--go-on", action="store_true", help="do not stop at the first failure")
    parser.add_argument("--out", type=Path, help="write the sums as JSON")
    return parser.parse_args()


def _scenario(args: argparse.Namespace, seed: int) -> Scenario:
    features = None if args.features is None else frozenset(args.features.split(","))
    return generate(seed, features).keep(_numbers(args.keep), _numbers(args.faults))


def _print_outcome(outcome: Outcome, num_traced: int) -> None:
    scenario = outcome.scenario
    print(f"features: {', '.join(scenario.features)}")
    print(f"workers {[(w.pool, w.dial) for w in scenario.workers]}, {scenario.num_blocks} blocks")
    for fault in scenario.faults:
        print(f"  {fault}")
    for spec in scenario.requests:
        print(f"  request {spec.index} at {spec.at:.3f}: {len(spec.prompt)} + {spec.max_tokens}")
    for now, what, value in outcome.trace[-num_traced:]:
        print(f"{now:12.6f}  {what}  {str(value)[:600] if value is not None else ''}")
    print(f"after {outcome.num_events} events: {outcome.violation or 'no violation'}")
    print(f"ends: {outcome.ends}")


def _report(args: argparse.Namespace, outcome: Outcome) -> None:
    seed = outcome.scenario.seed
    print(f"FAILED seed {seed} at event {outcome.num_events}: {outcome.violation}")
    small = shrink(outcome.scenario, outcome)
    _print_outcome(small.outcome, args.trace)
    extra = "" if args.mutant is None else f" --mutant {args.mutant}"
    if args.features is not None:
        extra += f" --features {args.features}"
    print(f"again: python -m tests.sim --seed {seed}{extra} --replay")
    print(f"small: {small.command(seed, extra)}")


def _many(args: argparse.Namespace) -> int:
    events = failures = 0
    seed = args.seed
    ends: dict[str, int] = {}
    kinds: dict[str, list[int]] = {}
    started = time.perf_counter()
    while events < args.events:
        outcome = simulate(_scenario(args, seed))
        events += outcome.num_events
        for how, count in outcome.ends.items():
            ends[how] = ends.get(how, 0) + count
        if outcome.violation is not None:
            failures += 1
            kinds.setdefault(outcome.kind, []).append(seed)
            if not args.go_on:
                _report(args, outcome)
                return 1
        seed += 1
    elapsed = time.perf_counter() - started
    print(f"seeds {args.seed}..{seed - 1}: {events} events, {events / elapsed:.0f} events/s")
    if args.out is not None:
        result: dict[str, object] = {
            "events": events,
            "seconds": round(elapsed, 1),
            "events_per_s": round(events / elapsed),
            "scenarios": seed - args.seed,
            "violations": failures,
            "ends_of_requests": ends,
            "disturbances": list(FEATURES),
            "mutants": len(all_mutants()),
        }
        write(args.out, result)
    print(f"ends: {ends}")
    for kind, seeds in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):6d}  {kind}  seeds {seeds[:8]}")
    return 1 if failures else 0


def main() -> int:
    args = _arguments()
    with mutated(args.mutant):
        if args.replay:
            outcome = simulate(_scenario(args, args.seed))
            _print_outcome(outcome, args.trace)
            return 1 if outcome.violation is not None else 0
        return _many(args)


if __name__ == "__main__":
    sys.exit(main())
