"""Percentiles of a load run: as a dictionary, a table in the terminal, and a plot."""

import math
from collections.abc import Iterable

from rich.table import Table

from diptych.engine.core.errors import ConfigError
from diptych.server.load.client import LoadResult

_ROWS = (
    ("ttft_ms", "Time to first token"),
    ("tpot_ms", "Time per output token"),
    ("itl_ms", "Inter-token latency"),
    ("e2el_ms", "End-to-end latency"),
)


def percentile(values: list[float], percent: float) -> float:
    """Nearest-rank percentile of unsorted `values`; NaN when empty."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _spread(seconds: Iterable[float]) -> dict[str, float]:
    values = [value * 1e3 for value in seconds]
    if not values:
        return {}
    return {
        "mean": sum(values) / len(values),
        "median": percentile(values, 50),
        "p90": percentile(values, 90),
        "p99": percentile(values, 99),
        "max": max(values),
    }


def summarize(results: list[LoadResult], duration_s: float) -> dict[str, object]:
    """Throughput over the whole run and latencies of the requests that completed."""
    good = [result for result in results if result.error is None]
    errors = sorted({result.error for result in results if result.error is not None})
    output = sum(result.output_tokens for result in good)
    prompt = sum(result.prompt_tokens for result in good)
    return {
        "duration_s": duration_s,
        "completed": len(good),
        "failed": len(results) - len(good),
        "errors": errors[:10],
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / duration_s,
        "output_throughput": output / duration_s,
        "total_token_throughput": (prompt + output) / duration_s,
        "ttft_ms": _spread(result.ttft_s for result in good),
        "tpot_ms": _spread(value for r in good if (value := r.tpot_s) is not None),
        "itl_ms": _spread(gap for result in good for gap in result.itl_s),
        "e2el_ms": _spread(result.e2e_s for result in good),
    }


def table(summary: dict[str, object]) -> Table:
    """The latencies as a table for people; the throughput is its caption."""
    shown = Table(
        title="Load result",
        caption=(
            f"{summary['completed']} completed, {summary['failed']} failed in "
            f"{summary['duration_s']:.2f} s: {summary['request_throughput']:.2f} requests/s, "
            f"{summary['output_throughput']:.1f} output tokens/s, "
            f"{summary['total_token_throughput']:.1f} tokens/s"
        ),
    )
    shown.add_column("ms")
    for name in ("mean", "median", "p90", "p99", "max"):
        shown.add_column(name, justify="right")
    for key, title in _ROWS:
        spread = summary[key]
        assert isinstance(spread, dict)
        if spread:
            shown.add_row(title, *(f"{value:.2f}" for value in spread.values()))
    return shown


def plot(results: list[LoadResult], path: str) -> None:
    """Cumulative distributions of TTFT and ITL, and output tokens per second over the run."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'diptych[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [result for result in results if result.error is None]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8))
    for axis, title, values in (
        (axes[0], "Time to first token, ms", [r.ttft_s * 1e3 for r in good]),
        (axes[1], "Inter-token latency, ms", [gap * 1e3 for r in good for gap in r.itl_s]),
    ):
        ordered = sorted(values)
        axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))])
        axis.set(title=title, ylabel="share of all", ylim=(0, 1))
        axis.grid(alpha=0.3)
    start = min((result.start_s for result in good), default=0.0)
    arrivals = sorted(time - start for result in good for time in result.chunk_s)
    seconds = int(arrivals[-1]) + 1 if arrivals else 1
    counts = [0] * seconds
    for time in arrivals:
        counts[int(time)] += 1
    axes[2].step(range(seconds), counts, where="post")
    axes[2].set(title="Chunks per second", xlabel="s")
    axes[2].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
