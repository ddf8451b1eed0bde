"""Diptych beside other engines, row by row of a table of loads.

Run: python -m bench.peers ROW ... --models DIRECTORY [--vllm-python P] [--llama-server P]
[--openvino-python P]. Servers of one row alternate turn by turn, the order rotates, and all but one
are halted. Several rows share servers where they ask for the same configuration. docs/BENCHMARKS.md
says how to install the peers and what each figure means.
"""

import argparse
import asyncio
import json
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import torch

from bench.kernels import limits
from bench.models import SIZES
from bench.peers import engines
from bench.peers.engines import WIDTHS, Engine, Setting
from bench.peers.hold import Hold
from bench.peers.process import Cores, Server
from bench.peers.report import Turn, report
from bench.peers.rows import LIMITED, ROWS, Row
from bench.peers.workloads import Client, Metrics, open_session
from bench.record import write
from diptych.kernels import load as load_kernels

_READ_BYTES: Final = 1 << 30  # far more than the caches hold
_START_S: Final = 60.0  # that a start or a first round may take
_REPEATS_MAX: Final = 2  # of disturbed rounds
_FOREIGN_SHARE_MAX: Final = 0.05  # of the cores, by processes that are neither server nor client


def machine_limits(threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    kernels = load_kernels("cpp", num_threads=threads)
    return limits(kernels.level, _READ_BYTES)


def variants(
    args: argparse.Namespace, row: Row, setting: Setting
) -> tuple[list[Engine], list[str]]:
    """Ours first. Peers that chunk prompts run once per size of step."""
    ours = replace(setting, step_tokens=row.ours_step_tokens)
    schemes = args.quantization or [setting.width]
    modes = args.modes or row.modes
    found = [engines.ours(args, ours, scheme, mode) for mode in modes for scheme in schemes]
    left_out: list[str] = []
    for step_tokens in row.step_tokens:
        peers, left_out = engines.peers(args, replace(setting, step_tokens=step_tokens))
        suffix = f" chunk {step_tokens}" if len(row.step_tokens) > 1 else ""
        found += [replace(peer, name=peer.name + suffix) for peer in peers]
    return found, left_out


async def turn(server: Server, row: Row, args: argparse.Namespace, pair: int) -> Metrics:
    """One load on a waking server."""
    model = row.model or args.model
    config = json.loads((args.models / model / "config.json").read_text())
    before, before_s = Cores.now(), server.cpu_s()
    async with open_session() as session:
        async with session.get(f"{server.url}/v1/models") as answer:
            name = str((await answer.json())["data"][0]["id"])
        client = Client(session, server.url, name, config["vocab_size"])
        # Rows share servers: another row's prompts would be in their caches.
        metrics = await row.load(client, random.Random(f"{args.seed} {row.help} {pair}"))
    metrics["server_cpu_s"] = server.cpu_s() - before_s
    metrics["foreign_cpu_share"] = before.foreign_share(metrics["server_cpu_s"])
    if "output_tokens" in metrics:
        cpu_us = metrics["server_cpu_s"] * 1e6
        metrics["server_cpu_us_per_token"] = cpu_us / metrics["output_tokens"]
    return metrics


def started_turn(engine: Engine, row: Row, args: argparse.Namespace, pair: int) -> Metrics:
    """A whole life: start, ready, first token, end."""
    before, start_s = Cores.now(), time.perf_counter()
    server = Server(engine, args.logs / f"{engine.name}.log")
    try:
        ready_s = server.await_ready(engine.start_s_max)
        asked_s = time.perf_counter()
        metrics = asyncio.run(turn(server, row, args, pair))
        first_s = asked_s - start_s + metrics["ttft_ms"] / 1e3
        foreign = before.foreign_share(server.cpu_s())
        return {"ready_s": ready_s, "first_token_s": first_s, "foreign_cpu_share": foreign}
    finally:
        server.close()


def run_starts(row: Row, setting: Setting, args: argparse.Namespace) -> None:
    found, left_out = variants(args, row, setting)

    def one_round(pair: int) -> list[Turn]:
        turns = []
        for engine in _rotated(found, pair):
            metrics = started_turn(engine, row, args, pair)
            _say("start", pair, engine.name, metrics)
            turns.append(Turn(engine.name, pair, metrics))
        return turns

    args.hold.take(0.0)
    one_round(-1)  # brings the files into the page cache
    result = _rounds("start", one_round, setting, args)
    facts = [_facts(engine, [*engine.words]) for engine in found]
    _write(args, "start", setting, result | {"engines": facts, "left_out": left_out})


def run_rows(names: list[str], setting: Setting, args: argparse.Namespace) -> None:
    """Rows that share one configuration, on the same servers."""
    found, left_out = variants(args, ROWS[names[0]], setting)
    with ExitStack() as stack:
        servers: list[Server] = []
        ready_s: dict[str, float] = {}
        for engine in found:
            args.hold.take(_START_S)
            server = Server(engine, args.logs / f"{engine.name}.log")
            stack.callback(server.close)
            ready_s[engine.name] = server.await_ready(engine.start_s_max)
            print(f"{engine.name}: ready after {ready_s[engine.name]:.1f} s", flush=True)
            asyncio.run(turn(server, ROWS[names[0]], args, -1))
            server.halt()
            servers.append(server)
        for name in names:
            result = _alternate(name, servers, setting, args)
            facts = [
                _facts(server.engine, server.command)
                | {"ready_s_once": ready_s[server.engine.name], "idle_cpu_s": server.idle_cpu_s}
                for server in servers
            ]
            skipped = [
                f"{s.engine.name}: --skip" for s in servers if _skipped(name, s.engine.name, args)
            ]
            _write(args, name, setting, result | {"engines": facts, "left_out": left_out + skipped})


def _skipped(row: str, engine: str, args: argparse.Namespace) -> bool:
    return any(f"{row}:{engine}".startswith(word) for word in args.skip)


def _alternate(
    name: str, servers: list[Server], setting: Setting, args: argparse.Namespace
) -> dict[str, object]:
    taking_part = [s for s in servers if not _skipped(name, s.engine.name, args)]

    def one_round(pair: int) -> list[Turn]:
        turns = []
        for server in _rotated(taking_part, pair):
            limited = server.engine.is_ours and LIMITED.intersection(ROWS[name].figures)
            before = machine_limits(args.threads) if limited else {}
            server.wake()
            metrics = asyncio.run(turn(server, ROWS[name], args, pair))
            server.halt()
            after = machine_limits(args.threads) if limited else {}
            metrics |= {f"limit_{key}": (before[key] + after[key]) / 2 for key in before}
            _say(name, pair, server.engine.name, metrics)
            turns.append(Turn(server.engine.name, pair, metrics))
        return turns

    return _rounds(name, one_round, setting, args)


def _rounds(
    name: str,
    one_round: Callable[[int], list[Turn]],
    setting: Setting,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Until enough rounds were quiet or no more may be repeated: then the quietest count."""
    rounds: list[tuple[float, list[Turn]]] = []
    bounds: list[dict[str, float]] = []
    round_s = _START_S
    while len(rounds) < args.pairs + _REPEATS_MAX:
        args.hold.take(round_s)
        start_s = time.perf_counter()
        if len(rounds) in (0, args.pairs - 1):
            bounds.append(machine_limits(args.threads))
        turns = one_round(len(rounds))
        round_s = time.perf_counter() - start_s
        rounds.append((max(turn.metrics["foreign_cpu_share"] for turn in turns), turns))
        if sum(foreign <= _FOREIGN_SHARE_MAX for foreign, _ in rounds) == args.pairs:
            break
    rounds.sort(key=lambda found: found[0])
    kept = [turn for _, turns in rounds[: args.pairs] for turn in turns]
    result = report(name, ROWS[name], setting, args, kept, bounds)
    return result | {"rounds_run": len(rounds)}


T = TypeVar("T")


def _rotated(items: list[T], pair: int) -> list[T]:
    shift = pair % len(items)
    return items[shift:] + items[:shift]


def _facts(engine: Engine, command: list[str]) -> dict[str, object]:
    return {"name": engine.name, "version": engine.version, "command": _without_folders(command)}


def _without_folders(words: list[str]) -> str:
    """Where programs and models lie on this machine is nobody's business."""
    return shlex.join([Path(word).name if word.startswith("/") else word for word in words])


def _say(row: str, pair: int, name: str, metrics: Metrics) -> None:
    shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    print(f"{row} pair {pair} {name}: {shown}", flush=True)


def _write(args: argparse.Namespace, row: str, setting: Setting, result: dict[str, object]) -> None:
    out = None
    if args.out is not None:
        out = args.out / f"peers_{row}_{setting.model}_{setting.width}.json"
    command = _without_folders(["python", "-m", "bench.peers", *sys.argv[1:]])
    write(out, result | {"command": command})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", nargs="+", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--model", choices=SIZES, default="bench-360m")
    add("--width", choices=WIDTHS, default="bf16", help="of the weights")
    add("--quantization", nargs="*", help="ours, a server each (default: the width's name)")
    add("--modes", nargs="*", choices=["split", "mixed"], help="ours (default: the row's)")
    add("--pairs", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--skip", nargs="*", default=[], metavar="ROW:ENGINE", help="an engine in one row")
    add("--seed", type=int, default=0)
    add("--alone", metavar="COMMAND", help="holds a machine that others use too, e.g. flock FILE")
    add("--hold-s", type=float, default=240.0, help="most seconds at a time that it is held")
    add("--logs", type=Path, default=Path("/tmp"), help="directory for the servers' output")
    add("--out", type=Path, help="directory for the results")
    engines.add_arguments(parser)
    args = parser.parse_args()
    args.logs = args.logs.absolute()
    args.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are ended on the way
    args.hold = Hold(args.alone, args.hold_s)
    try:
        _run_all(args)
    finally:
        args.hold.release()


def _run_all(args: argparse.Namespace) -> None:
    groups: dict[Setting, list[str]] = {}
    for name in args.rows:
        row = ROWS[name]
        setting = Setting(
            row.model or args.model,
            args.width,
            row.step_tokens[0],
            row.num_seqs,
            row.context,
            args.threads,
        )
        if name == "start":
            run_starts(row, setting, args)
        else:
            groups.setdefault(setting, []).append(name)
    for setting, names in groups.items():
        # rows with several sizes of step need servers of their own
        shared = [name for name in names if len(ROWS[name].step_tokens) == 1]
        for batch in [shared, *([name] for name in names if name not in shared)]:
            if batch:
                run_rows(batch, setting, args)


if __name__ == "__main__":
    main()
