"""`diptych status`: what it shows of a reading, and that JSON and terminal say the same."""

import io
import json
from typing import Any

from rich.console import Console

from diptych.engine.core.messages import (
    ColdStart,
    PairStats,
    PoolStats,
    Stats,
    WorkerStats,
)
from diptych.server.http.server_info import _named
from diptych.server.status_view import render


def reading(**changes: Any) -> dict[str, Any]:
    engine: dict[str, Any] = {
        "scheduler_epoch": 1,
        "running": 3,
        "waiting": 2,
        "blocks_total": 100,
        "blocks_used": 50,
        "blocks_cached": 10,
        "prefix_queries": 100,
        "prefix_hits": 25,
        "preemptions": 1,
        "rejections": 5,
        "losses": 0,
        "prefill_tokens": 1000,
        "workers": [
            WorkerStats(0, 1, 100, 1, 50, 0.0125, 0, False, 0, 900),
            WorkerStats(1, 3, 0, 2, 70, 0.01, 1, True, 200, 0),
        ],
        "ready": True,
        "pools": [PoolStats(0, 40, 36, 0), PoolStats(1, 60, 14, 10)],
        "pairs": [PairStats(0, 1, 500, 2.5e-5)],
        "dial_moves": 4,
        "pressure": (1.5, 0.25),
        "workers_wanted": 2,
        "cold_start": ColdStart(1, 0.1, 1.2, 0.3, 0.05, 0.02, 0.01, 1.68),
    }
    stats = Stats(**(engine | changes))
    info: dict[str, Any] = {
        "version": "1",
        "models": ["m"],
        "model": {"dtype": "bfloat16", "max_model_len": 1024},
        "health": {"ok": True, "reason": ""},
        "in_flight": 3,
        "generated_tokens": 400,
        "engine": _named(stats),
    }
    return json.loads(json.dumps(info))


def shown(info: dict[str, Any], before: dict[str, Any] | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(info, before, 2.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(text: str, word: str) -> list[str]:
    rows = [row.strip("│ ") for row in text.splitlines()]
    return next(row for row in rows if row.startswith(word)).split()


def test_pools_workers_transfers_and_scaling() -> None:
    text = shown(reading())
    assert "healthy" in text
    assert line(text, "0 █")[-3:] == ["90.0%", "0.0%", "40"]
    assert line(text, "0.1")[:4] == ["0.1", "0", "prefill", "100"]
    assert "leaving" in line(text, "1.3")
    assert "0 → 1" in text
    assert "25.0" in line(text, "0 → 1")
    assert "1.50" in line(text, "pressure")
    assert "1.68 s" in text
    assert "1 of 2 wanted" in text


def test_a_pair_that_does_not_go_together_says_why() -> None:
    text = shown(reading(pairs=[PairStats(0, 1, 0, 2.5e-5, "refused: another layout")]))
    assert "refused: another layout" in next(row for row in text.splitlines() if "0 → 1" in row)


def test_rates_are_differences_of_one_incarnation() -> None:
    before = reading()
    workers = [
        WorkerStats(0, 1, 50, 1, 90, 0.01, 0, False, 0, 1900),
        WorkerStats(1, 4, 0, 2, 10, 0.01, 1, False, 30, 0),
    ]
    now = reading(workers=workers, pairs=[PairStats(0, 1, 700, 2.5e-5)], prefill_tokens=2000)
    now["generated_tokens"] = 480
    text = shown(now, before)
    assert line(text, "tokens/s")[1:3] == ["40.0", "answered,"]
    assert line(text, "0.1")[-4:] == ["20.0", "10.00", "0.0", "500"]
    assert line(text, "1.4")[-4:] == ["-", "10.00", "-", "-"], "it was not there before"
    assert "100" in line(text, "0 → 1")
    assert "both" in line(text, "0.1")


def test_nobody_there_and_nothing_known() -> None:
    text = shown(reading(workers=[], pairs=[], pressure=None, workers_wanted=None))
    assert "the next request starts one" in text
    assert "pressure" not in text
    assert "scaling" not in text
    info = reading()
    info["engine"] = None
    assert "has not reported yet" in shown(info)
    info = reading()
    info["health"] = {"ok": False, "reason": "no worker is ready"}
    assert "no worker is ready" in shown(info)


def test_it_fits_a_terminal_of_80_columns() -> None:
    for row in shown(reading(), reading(), width=80).splitlines():
        assert len(row) == 80
        assert "…" not in row
