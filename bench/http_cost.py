"""Cost of the HTTP side: tokens per second and CPU per token of every process, with a tiny model.

Run: python -m bench.http_cost [--out FILE]; for a server that runs already, say a peer's, with
--url http://127.0.0.1:PORT --model NAME --pid PID. The client is a process of its own on the same
cores (bench.sse_client). CPU times are the kernel's (/proc/PID/stat); tokens are the server's own
counter `vllm:generation_tokens_total`, read at both ends of the window.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.models import write_model
from bench.procs import descendants
from bench.record import spread, write
from bench.serving import Serving

_WARM_S = 3.0
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(root: int) -> dict[str, float]:
    """Process name -> CPU seconds of `root` and all below it; equal names are summed."""
    sums: dict[str, float] = {}
    for pid, comm in {root: "supervisor", **descendants(root)}.items():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            seconds = (int(fields[11]) + int(fields[12])) / _TICK
            name = comm.removeprefix("dt-")
            sums[name] = sums.get(name, 0.0) + seconds
    return sums


def generated(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    lines = [x for x in text.splitlines() if x.startswith("vllm:generation_tokens_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def client(port: int, model: str, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bench.sse_client", "--port", str(port), "--model", model]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, _ = process.communicate(timeout=300)
    result: dict[str, Any] = json.loads(out)
    return result


def window(url: str, model: str, root: int, streams: int, seconds: float) -> dict[str, Any]:
    """One closed-loop run; the numbers are those of the window after the warm-up."""
    port = int(url.rsplit(":", 1)[1])
    words = ("--streams", str(streams), "--seconds", str(seconds + _WARM_S + 1))
    load = client(port, model, *words)
    time.sleep(_WARM_S)
    tokens, cpu, start = generated(url), cpu_seconds(root), time.perf_counter()
    time.sleep(seconds)
    tokens = generated(url) - tokens
    elapsed = time.perf_counter() - start
    after = cpu_seconds(root)
    used = {name: round((after[name] - cpu.get(name, 0)) / tokens * 1e6, 1) for name in after}
    seen = answer(load)
    assert not seen["errors"], seen
    total = sum(used.values())
    return {
        "streams": streams,
        "tokens_per_s": round(tokens / elapsed, 1),
        "cpu_us_per_token": {name: us for name, us in used.items() if us >= 0.1},
        "cpu_us_per_token_all": round(total, 1),
        "tokens_per_s_per_core": round(1e6 / total, 1),
        "client": seen,
    }


def crowd(url: str, model: str, root: int, streams: int, tokens: int) -> dict[str, Any]:
    """Every stream open at once, one answer each: none lost, no chunk a second after another."""
    port = int(url.rsplit(":", 1)[1])
    cpu = sum(cpu_seconds(root).values())
    words = ("--streams", str(streams), "--tokens", str(tokens), "--once")
    seen = answer(client(port, model, *words))
    assert not seen["errors"], seen
    assert (seen["answers"], seen["late"]) == (streams, 0), seen
    used = sum(cpu_seconds(root).values()) - cpu
    return {
        "streams": streams,
        "tokens_each": tokens,
        "tokens_per_s": round(seen["tokens"] / seen["seconds"], 1),
        "tokens_per_s_per_core": round(seen["tokens"] / used, 1),
        "client": seen,
    }


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(url, model name, root pid) of the server under test."""
    if args.url is not None:
        yield args.url, args.model, args.pid
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny", "tiny")
        flags = ["--load-format", "dummy", "--served-model-name", "tiny", *args.flags]
        with Serving(model, *flags, "--max-num-seqs", "1024", log=args.log) as serving:
            yield serving.url, "tiny", serving.process.pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pid", type=int, help="root process of the server at --url")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--crowd", type=int, default=1000, help="streams open at once, 0: none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("flags", nargs="*", help="after --: further flags of our server")
    args = parser.parse_args()
    with server(args) as (url, model, root):
        rows = [window(url, model, root, args.streams, args.seconds) for _ in range(args.runs)]
        result: dict[str, object] = {
            "tokens_per_s": spread([row["tokens_per_s"] for row in rows]),
            "cpu_us_per_token_all": spread([row["cpu_us_per_token_all"] for row in rows]),
            "rows": rows,
        }
        if args.crowd:
            result["crowd"] = crowd(url, model, root, args.crowd, 128)
    write(args.out, result)


if __name__ == "__main__":
    main()
