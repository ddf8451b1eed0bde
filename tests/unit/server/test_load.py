"""The load generator against a scripted OpenAI-compatible server, and its arithmetic."""

import argparse
import asyncio
import io
import json
import math
import random

import numpy as np
import pytest
from aiohttp import web
from rich.console import Console

from diptych.engine.core.errors import ConfigError
from diptych.server.load import run as load
from diptych.server.load.client import LoadRequest, LoadResult
from diptych.server.load.report import percentile, plot, summarize, table


def test_percentile_equals_numpy_nearest_rank() -> None:
    rng = random.Random(3)
    for _ in range(50):
        values = [rng.random() for _ in range(rng.randrange(1, 40))]
        for percent in (1, 50, 90, 99, 100):
            want = np.percentile(values, percent, method="inverted_cdf")
            assert percentile(values, percent) == want, f"seed 3, {percent} of {values}"
    assert math.isnan(percentile([], 50))


def test_summary_counts_and_times() -> None:
    good = LoadResult(10.0, 13.0, [11.0, 12.0, 13.0], prompt_tokens=5, output_tokens=3)
    bad = LoadResult(10.0, 10.5, error="HTTP 429: full")
    summary = summarize([good, bad], 4.0)
    assert summary["completed"] == 1
    assert summary["failed"] == 1
    assert summary["errors"] == ["HTTP 429: full"]
    assert summary["output_throughput"] == 3 / 4
    assert summary["ttft_ms"]["median"] == 1000.0  # type: ignore[index]
    assert summary["tpot_ms"]["median"] == 1000.0  # type: ignore[index]
    assert summary["itl_ms"]["max"] == 1000.0  # type: ignore[index]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(summary))
    assert "Time to first token" in console.export_text()


def test_random_requests_have_the_lengths_asked_for() -> None:
    rows = load.random_requests(20, 30, 7, 5, 0.0, seed=1)
    assert all(len(row.prompt) == 35 and row.max_tokens == 7 for row in rows)
    assert all(row.prompt[:5] == rows[0].prompt[:5] for row in rows)
    assert rows == load.random_requests(20, 30, 7, 5, 0.0, seed=1)
    assert rows[0].prompt != rows[1].prompt


async def _completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if body["prompt"] == "refuse":
        return web.Response(status=429, text="full")
    response = web.StreamResponse()
    await response.prepare(request)
    for index in range(body["max_tokens"]):
        chunk = {"choices": [{"index": 0, "text": str(index)}]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    if body["prompt"] != "cut":
        await response.write(b"data: [DONE]\n\n")
    return response


async def _run(requests: list[LoadRequest], rate: float | None) -> list[LoadResult]:
    app = web.Application()
    app.router.add_post("/v1/completions", _completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    plan = load.LoadPlan(f"http://127.0.0.1:{port}", "m", requests, rate, 3, True, 0)
    try:
        results, _ = await load.run_load(plan, Console(quiet=True))
    finally:
        await runner.cleanup()
    return results


def test_every_request_is_accounted_for() -> None:
    texts = ["hello", "refuse", "cut", "x"] * 3
    results = asyncio.run(_run([LoadRequest(text, 4) for text in texts], rate=1000.0))
    assert len(results) == len(texts)
    good = [result for result in results if result.error is None]
    assert len(good) == 6
    assert all(result.output_tokens == 4 and len(result.chunk_s) == 4 for result in good)
    errors = sorted({str(result.error) for result in results if result.error})
    assert errors == ["HTTP 429: full", "the stream ended without [DONE]"]


def test_a_server_that_is_not_there_is_one_line() -> None:
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    with pytest.raises(ConfigError, match="no OpenAI-compatible server answers"):
        load.main(parser.parse_args(["--base-url", "http://127.0.0.1:9"]))


def test_dataset_errors_name_the_line(tmp_path: object) -> None:
    path = f"{tmp_path}/prompts.jsonl"
    with open(path, "w") as file:
        file.write('{"prompt": "a"}\nnot json\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2"):
        load.file_requests(path, 10, 5)


def test_plot_writes_a_picture(tmp_path: object) -> None:
    pytest.importorskip("matplotlib")
    path = f"{tmp_path}/load.png"
    plot([LoadResult(0.0, 2.0, [0.5, 1.0, 2.0])], path)
    with open(path, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
