"""Several API servers on one port: one is killed under load, and the others notice nothing."""

import http.client
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.models import write_model
from bench.procs import engine_processes
from bench.serving import Serving
from tests.support.processes import wait_for

NUM_TOKENS = 3000
BODY = {"model": "m", "prompt": [5] * 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = write_model(tmp_path_factory.mktemp("model"), "tiny")
    flags = ["--load-format", "dummy", "--served-model-name", "m", "--threads", "1"]
    with Serving(folder, *flags, "--api-server-count", "2", log=folder / "log") as serving:
        yield serving


def generated(server: Serving) -> float:
    lines = server.get("/metrics").splitlines()
    [line] = [x for x in lines if x.startswith("vllm:generation_tokens_total")]
    return float(line.rsplit(" ", 1)[1])


class Streaming:
    """One streamed completion; `api` is the number of the API server that answers."""

    def __init__(self, server: Serving) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps(BODY | {"max_tokens": NUM_TOKENS, "stream": True, **USAGE})
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/completions", body, headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.head = self.response.readline()
        self.api = int(json.loads(self.head.removeprefix(b"data: "))["id"].split("-")[1])

    def rest(self) -> tuple[str, int | None] | None:
        """(text, tokens counted in usage); None: the connection ended before [DONE]."""
        try:
            lines = [self.head, *self.response.read().splitlines()]
        except (http.client.HTTPException, OSError):
            return None
        finally:
            self.connection.close()
        events = [line[6:].strip() for line in lines if line.startswith(b"data: ")]
        if not events or events[-1] != b"[DONE]":
            return None
        chunks = [json.loads(event) for event in events[:-1]]
        text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
        return text, chunks[-1]["usage"]["completion_tokens"]


USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


def spread(server: Serving, count: int) -> list[Streaming]:
    """Streams on both API servers, `count` at least."""
    streams: list[Streaming] = []
    while len(streams) < count or len({stream.api for stream in streams}) < 2:
        assert len(streams) < 400, "one API server takes all connections"
        streams.append(Streaming(server))
    return streams


def test_one_is_killed_and_the_others_go_on(server: Serving) -> None:
    alone = Streaming(server).rest()
    assert alone is not None
    streams = spread(server, 12)
    victim = streams[-1].api  # the one that was begun last
    before_kill = generated(server)
    pid = engine_processes(server.process.pid)[f"api{victim}"]
    os.kill(pid, signal.SIGKILL)
    with ThreadPoolExecutor(len(streams)) as pool:
        ends = list(pool.map(Streaming.rest, streams))
    for stream, end in zip(streams, ends, strict=True):
        if stream.api != victim:
            assert end == alone, "a stream of the other API server changed"
    assert any(end is None for end in ends), "it was killed under load"
    wait_for(
        "the API server is back",
        lambda: engine_processes(server.process.pid).get(f"api{victim}", pid) != pid,
    )
    again = spread(server, 2)
    assert all(stream.rest() == alone for stream in again)
    wait_for("nothing runs", lambda: "num_requests_running" in running(server))
    assert generated(server) >= before_kill


def running(server: Serving) -> str:
    """The line of the metric once it is zero, else nothing."""
    lines = server.get("/metrics").splitlines()
    [line] = [x for x in lines if x.startswith("vllm:num_requests_running")]
    return line if line.endswith(" 0.0") else ""


def test_any_of_them_shows_the_sums_of_all(server: Serving) -> None:
    before = generated(server)
    seen: set[int] = set()
    count = 0
    while len(seen) < 2:
        status, answer = server.post("/v1/completions", BODY | {"max_tokens": 7})
        assert status == 200
        seen.add(int(answer["id"].split("-")[1]))
        count += 1
        assert generated(server) == before + 7 * count
        assert count < 400


def test_one_process_cannot_be_several(tmp_path: Path) -> None:
    serving = Serving(write_model(tmp_path, "tiny"), "--inline", "--api-workers", "2")
    assert serving.process.wait(60) != 0
