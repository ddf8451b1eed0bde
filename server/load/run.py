"""`diptych bench`: drives a server at a fixed concurrency or a Poisson rate.

Owns the schedule of arrivals (seeded) and the progress bar. The server is any OpenAI-compatible
one. Invariant: every planned request is sent once and accounted for, failed ones included.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diptych.engine.core.errors import ConfigError
from diptych.server.load.client import LoadRequest, LoadResult, run_request
from diptych.server.load.report import plot, summarize, table

_BYTE_IDS = range(3, 256)  # token ids that every vocabulary has


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to send and when. `rate` None: as fast as `concurrency` allows."""

    url: str
    model: str
    requests: list[LoadRequest]
    rate: float | None  # mean requests per second of a Poisson process
    concurrency: int | None  # most requests open at once
    ignore_eos: bool
    seed: int


def random_requests(
    count: int, input_len: int, output_len: int, prefix_len: int, range_ratio: float, seed: int
) -> list[LoadRequest]:
    """Random token prompts; lengths uniform in [len * (1 - r), len * (1 + r)]."""
    rng = random.Random(seed)
    prefix = rng.choices(_BYTE_IDS, k=prefix_len)

    def length(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - range_ratio, 1 + range_ratio)))

    return [
        LoadRequest(prefix + rng.choices(_BYTE_IDS, k=length(input_len)), length(output_len))
        for _ in range(count)
    ]


def file_requests(path: str, count: int, output_len: int) -> list[LoadRequest]:
    """Prompts of a JSON-lines file: `prompt` (text or token ids), optional `max_tokens`."""
    requests: list[LoadRequest] = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines()):
        if not line.strip() or len(requests) == count:
            continue
        try:
            row = json.loads(line)
            requests.append(LoadRequest(row["prompt"], int(row.get("max_tokens", output_len))))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number + 1}: need a JSON object with 'prompt'") from error
    if not requests:
        raise ConfigError(f"{path} holds no prompts")
    return requests


async def run_load(plan: LoadPlan, console: Console) -> tuple[list[LoadResult], float]:
    """Sends the whole plan; returns results in order of completion, and the seconds it took."""
    rng = random.Random(plan.seed)
    gate = asyncio.Semaphore(plan.concurrency or len(plan.requests))
    results: list[LoadResult] = []
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    connector = aiohttp.TCPConnector(limit=0)
    limit = aiohttp.ClientTimeout(total=None, sock_connect=30)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(plan.requests))
        async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:

            async def one(request: LoadRequest) -> None:
                async with gate:
                    result = await run_request(
                        session, plan.url, plan.model, request, plan.ignore_eos
                    )
                results.append(result)
                progress.advance(bar)

            start = time.perf_counter()
            due = start
            async with asyncio.TaskGroup() as group:
                for request in plan.requests:
                    if plan.rate is not None:
                        due += rng.expovariate(plan.rate)
                        await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    group.create_task(one(request))
            duration_s = time.perf_counter() - start
    return results, duration_s


async def _served_model(url: str) -> str:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.get(f"{url}/v1/models") as response,
    ):
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags named as in `vllm bench serve` where the meaning is the same."""
    add = parser.add_argument
    add(
        "--base-url",
        "--url",
        default="http://127.0.0.1:8000",
        help="server to load (default: %(default)s)",
    )
    add("--model", help="model name to ask for (default: the first one served)")
    add("--num-prompts", type=int, default=100, help="requests to send (default: %(default)s)")
    add("--request-rate", type=float, help="mean requests per second, Poisson (default: no limit)")
    add("--max-concurrency", type=int, help="most requests open at once (default: no limit)")
    add("--random-input-len", type=int, default=128, help="prompt tokens (default: %(default)s)")
    add("--random-output-len", type=int, default=64, help="output tokens (default: %(default)s)")
    add("--random-prefix-len", type=int, default=0, help="tokens shared by all prompts")
    add("--random-range-ratio", type=float, default=0.0, help="spread of lengths, 0..1")
    add("--dataset-path", help="JSON lines with 'prompt' and optional 'max_tokens', instead")
    add("--respect-eos", action="store_true", help="let answers end early (default: full length)")
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--out", metavar="FILE.json", help="write the result as JSON")
    add("--plot", metavar="FILE.png", help="write a plot (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 if any request failed."""
    if args.num_prompts < 1 or (args.request_rate is not None and args.request_rate <= 0):
        raise ConfigError("--num-prompts and --request-rate must be positive")
    console = Console(stderr=True)
    url = args.base_url.rstrip("/")
    try:
        model = args.model or asyncio.run(_served_model(url))
    except (aiohttp.ClientError, TimeoutError, OSError, KeyError, IndexError) as error:
        raise ConfigError(f"no OpenAI-compatible server answers at {url}: {error}") from error
    if args.dataset_path:
        requests = file_requests(args.dataset_path, args.num_prompts, args.random_output_len)
    else:
        requests = random_requests(
            args.num_prompts,
            args.random_input_len,
            args.random_output_len,
            args.random_prefix_len,
            args.random_range_ratio,
            args.seed,
        )
    plan = LoadPlan(
        url=url,
        model=model,
        requests=requests,
        rate=args.request_rate,
        concurrency=args.max_concurrency,
        ignore_eos=not args.respect_eos,
        seed=args.seed,
    )
    results, duration_s = asyncio.run(run_load(plan, console))
    summary = summarize(results, duration_s)
    Console().print(table(summary))
    errors = sorted({result.error for result in results if result.error is not None})
    for message in errors[:10]:
        print(f"error: {message}", file=sys.stderr)
    if args.out:
        Path(args.out).write_text(
            json.dumps({"args": vars(args) | {"run": None}, **summary}, indent=1)
        )
    if args.plot:
        plot(results, args.plot)
    return 1 if summary["failed"] else 0
