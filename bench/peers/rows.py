"""The table of comparisons: each row's load, the configuration it asks for, its figures.

Owns the definition of "better" per figure. A row is run for one model and one width at a time.
"""

from dataclasses import dataclass
from typing import Final

from bench.peers.workloads import (
    Load,
    arrival,
    one_stream,
    prefill,
    shared_prefix,
    streams,
)


@dataclass(frozen=True)
class Row:
    """`step_tokens` are tried one server each, for peers that chunk prompts; ours runs `modes`."""

    help: str
    load: Load
    figures: tuple[str, ...]  # compared as ratios; names ending in _s or _ms: lower is better
    num_seqs: int
    context: int
    modes: tuple[str, ...] = ("mixed",)
    step_tokens: tuple[int, ...] = (2048,)
    ours_step_tokens: int = 2048
    model: str | None = None  # None: the one asked for


LIMITED: Final = {"steady_tok_s", "prefill_tok_s"}
"""Figures that a limit of the machine bounds."""

ROWS: Final = {
    "decode": Row(
        "one stream, 128 in / 128 out",
        one_stream(128, 128),
        ("steady_tok_s",),
        num_seqs=16,
        context=2304,
    ),
    "streams": Row(
        "16 streams at once, 256 in / 64 out",
        streams(16, 256, 64),
        ("output_tok_s", "ttft_p50_ms"),
        num_seqs=16,
        context=2304,
    ),
    "prefill-256": Row(
        "one prompt of 256 tokens, five times",
        prefill(256, 5),
        ("prefill_tok_s",),
        num_seqs=16,
        context=2304,
    ),
    "prefill-2048": Row(
        "one prompt of 2,048 tokens",
        prefill(2048, 1),
        ("prefill_tok_s",),
        num_seqs=16,
        context=2304,
    ),
    "arrival": Row(
        "4 running decodes while a prompt of 2,048 tokens arrives",
        arrival(4, 2048),
        ("itl_p50_ms", "itl_p99_ms", "ttft_ms"),
        num_seqs=16,
        context=2304,
        modes=("split", "mixed"),
        step_tokens=(2048, 256),
        ours_step_tokens=256,
    ),
    "prefix": Row(
        "16 requests with 1,024 shared and 64 own tokens, 32 out, prefix warm",
        shared_prefix(16, 1024, 64, 32),
        ("ttft_p50_ms", "output_tok_s"),
        num_seqs=16,
        context=2304,
        step_tokens=(2048, 256),
    ),
    "http": Row(
        "a tiny model, 64 streams, 32 in / 128 out: the cost of serving itself",
        streams(64, 32, 128),
        ("output_tok_s", "server_cpu_us_per_token"),
        num_seqs=64,
        context=256,
        model="bench-tiny",
    ),
    "start": Row(
        "from the start of the process to ready, and to the first token",
        one_stream(16, 2),
        ("ready_s", "first_token_s"),
        num_seqs=16,
        context=2304,
    ),
}


def lower_is_better(figure: str) -> bool:
    return figure.endswith(("_ms", "_us_per_token")) or figure in ("ready_s", "first_token_s")
