"""`diptych serve` as a user meets it: real processes, real HTTP, the openai package, bad input."""

import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.models import write_model
from bench.procs import descendants
from bench.serving import Serving
from diptych.server import cli

PROMPT = list(range(40, 120))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = write_model(tmp_path_factory.mktemp("model"), "tiny")
    flags = ["--load-format", "dummy", "--served-model-name", "m", "alias", "--threads", "1"]
    with Serving(folder, *flags, log=folder / "log") as serving:
        yield serving


def completion(server: Serving, **changes: Any) -> tuple[int, Any]:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", body | {"return_token_ids": True} | changes)


def test_openai_package_streams_what_it_gets_whole(server: Serving) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    ask: dict[str, Any] = {
        "model": "alias",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 30,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    with client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens  # type: ignore[union-attr]
    client.close()


def test_tokens_came_from_two_workers(server: Serving) -> None:
    """The prefill worker computed prompts, the decode worker made steps."""
    status, _ = completion(server, prompt=list(range(200)) * 2)
    assert status == 200
    metrics = server.get("/metrics")
    assert 'vllm:prompt_tokens_total{engine="0",model_name="m"}' in metrics
    assert "vllm:kv_cache_usage_perc" in metrics
    for name in ("queue_time_seconds", "prefill_time_seconds", "num_preemptions"):
        assert _gauge(server, f"vllm:request_{name}_count") > 0, name


BAD: list[tuple[str, object, int, str]] = [
    ("malformed JSON", b'{"model": "m", ', 400, "JSON"),
    ("invalid UTF-8", b'{"model": "m", "prompt": "\xff\xfe"}', 400, "UTF-8"),
    ("no object", b"[1, 2]", 400, "object"),
    ("unknown model", {"model": "nope", "prompt": "a"}, 404, "nope"),
    ("too long", {"model": "m", "prompt": [1] * 5000}, 400, "maximum context length"),
    ("too many tokens", {"model": "m", "prompt": "a", "max_tokens": 10**7}, 400, "max_tokens"),
    ("n", {"model": "m", "prompt": "a", "n": 10**9}, 400, "n"),
    ("temperature", {"model": "m", "prompt": "a", "temperature": -1}, 400, "temperature"),
    ("NaN", b'{"model": "m", "prompt": "a", "temperature": NaN}', 400, "NaN"),
    ("bias", {"model": "m", "prompt": "a", "logit_bias": {"1": 1e9}}, 400, "logit_bias"),
    ("empty prompt", {"model": "m", "prompt": ""}, 400, "prompt"),
    ("token id", {"model": "m", "prompt": [10**6]}, 400, "token id"),
    ("tools", {"model": "m", "prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("10 MB", b'{"model": "m", "prompt": "' + b"a" * 10_000_000 + b'"}', 413, "large"),
]


@pytest.mark.parametrize(("name", "body", "status", "word"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_answered_and_neighbours_are_untouched(
    server: Serving, name: str, body: object, status: int, word: str
) -> None:
    good = completion(server)[1]["choices"][0]["token_ids"]
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(completion, server)
        got, answer = server.post("/v1/completions", body)
        assert neighbour.result()[1]["choices"][0]["token_ids"] == good
    assert got == status, (name, answer)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert word.lower() in answer["error"]["message"].lower(), answer
    assert server.status("/health") == 200


def test_empty_messages_are_refused(server: Serving) -> None:
    status, answer = server.post("/v1/chat/completions", {"model": "m", "messages": []})
    assert status == 400
    assert "messages" in answer["error"]["message"]


def test_a_client_that_leaves_frees_its_blocks(server: Serving) -> None:
    body = json.dumps(
        {"model": "m", "prompt": PROMPT, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while received.count(b"data:") < 5:
            received += connection.recv(65536)
    deadline = time.monotonic() + 5
    while _gauge(server, "vllm:num_requests_running") or _gauge(server, "vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "blocks are still in use"
        threading.Event().wait(0.02)


def _gauge(server: Serving, name: str) -> float:
    lines = server.get("/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def test_seeded_sampling_repeats(server: Serving) -> None:
    ask = {"temperature": 1.0, "seed": 5, "n": 3, "logprobs": 2}
    first, second = (completion(server, **ask)[1]["choices"] for _ in range(2))
    assert first == second
    assert len({tuple(choice["token_ids"]) for choice in first}) == 3


def test_bench_and_chat_talk_to_it(
    server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "load.json"
    words = ["--num-prompts", "12", "--max-concurrency", "4", "--random-output-len", "8"]
    assert cli.main(["bench", "--base-url", server.url, "--out", str(out), *words]) == 0
    result = json.loads(out.read_text())
    assert result["completed"] == 12
    assert result["total_output_tokens"] == 12 * 8
    assert result["ttft_ms"]["median"] > 0

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    capsys.readouterr()
    assert cli.main(["chat", "--url", server.url, "--max-tokens", "12"]) == 0
    whole = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
    answer = server.post("/v1/chat/completions", whole | {"temperature": 0})[1]
    assert capsys.readouterr().out.rstrip("\n") == answer["choices"][0]["message"]["content"]


def test_status_shows_workers_and_memory(
    server: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    completion(server)
    assert cli.main(["status", "--url", server.url, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["models"] == ["m", "alias"]
    assert info["health"]["ok"]
    assert info["generated_tokens"] >= 24
    assert [worker["dial"] for worker in info["engine"]["workers"]] == [100, 0]
    assert info["engine"]["blocks_total"] == info["model"]["num_blocks"]
    assert cli.main(["status", "--url", server.url]) == 0
    shown = capsys.readouterr().out
    for word in ("healthy", "prefill", "decode", "KV in use", "since start"):
        assert word in shown, shown


def test_sigterm_drains_and_ends_with_0(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "tiny", max_position_embeddings=16_384)
    flags = ["--load-format", "dummy", "--served-model-name", "m"]
    with Serving(folder, *flags) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(completion, server, max_tokens=8000)
        while not _gauge(server, "vllm:num_requests_running"):
            assert not running.done()
        for pid in descendants(server.process.pid):  # as a service manager does: all of them
            os.kill(pid, signal.SIGTERM)
        assert server.stop() == 0
        status, answer = running.result()
    assert status == 200
    assert len(answer["choices"][0]["token_ids"]) == 8000


def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path, "tiny")
    for words, text in (
        (["serve", "./nothing-here"], "no such folder"),
        (["serve", str(folder), "--host", "0.0.0.0", "--load-format", "dummy"], "API key"),
        (["serve", str(folder), "--prefill", "1", "--decode", "0"], "--prefill"),
        (["serve", str(folder), "--block-size", "10"], "multiple of 16"),
        (["serve", str(folder), "--cpu-cores", "0-99999"], "may not use core"),
        (["serve", str(folder), "--cpu-cores", "a"], "--cpu-cores"),
        (["serve", str(folder), "--threads", "0"], "at least 1 thread"),
        (["chat", "--url", "http://127.0.0.1:9"], "no server answers"),
        (["status", "--url", "http://127.0.0.1:9"], "no server answers"),
    ):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert text in error, error
        assert error.count("\n") == 1, error
