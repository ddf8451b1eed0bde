"""`diptych serve` and `diptych join` as a user starts them: an API server on each of two hosts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bench.procs import descendants
from bench.ray_nodes import free_port
from tests.support.processes import wait_for

WAIT_S = 60.0
ASK = {
    "model": "diptych-builtin",
    "prompt": "Once upon a time there was " * 8,
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


@contextmanager
def diptych(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "diptych.server.cli", *words])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"{url(port)}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(port: int) -> str:
    answer = httpx.post(f"{url(port)}/v1/completions", json=ASK, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def num_workers(port: int) -> int:
    engine = httpx.get(f"{url(port)}/server_info", timeout=5).json()["engine"]
    return 0 if engine is None else len(engine["workers"])


@pytest.mark.timeout(150)
def test_the_death_of_a_host_with_an_api_server_is_the_death_of_that_one(tmp_path: Path) -> None:
    key = str(tmp_path / "key")
    home, away, link = free_port(), free_port(), free_port()
    head = f"127.0.0.1:{link}"
    base = ["--threads", "1", "--cluster-address", head, "--cluster-key-file", key]
    join = ["join", head, "--cluster-key-file", key]
    serve = ["serve", "--port", str(home), "--prefill", "1", "--decode", "1", *base]
    with diptych(*serve) as server:
        wait_for("the key", lambda: Path(key).exists() and Path(key).stat().st_size > 0, WAIT_S)
        front = [*join, "--host-ip", "127.0.0.2", "--api-port", str(away)]
        mixed = [*join, "--host-ip", "127.0.0.3", "--mixed", "1"]
        with diptych(*front) as host, diptych(*mixed) as helper:
            for port in (home, away):
                wait_for(f"{port} is healthy", lambda port=port: healthy(port), WAIT_S)
            wait_for("all workers", lambda: num_workers(away) == 3, WAIT_S)
            right = ask(home)
            assert ask(away) == right

            # Its API server dies alone and comes back there.
            (api,) = [p for p, name in descendants(host.pid).items() if name.startswith("dt-api")]
            os.kill(api, signal.SIGKILL)
            wait_for("it is healthy again", lambda: healthy(away), WAIT_S)
            assert ask(away) == right

            # The whole host dies: the other API server does not notice.
            host.kill()
            host.wait()
            assert ask(home) == right
            wait_for("its port is closed", lambda: not healthy(away), WAIT_S)

            # A host leaves in order.
            helper.send_signal(signal.SIGTERM)
            assert helper.wait(30) == 0
            wait_for("its worker is gone", lambda: num_workers(home) == 2, WAIT_S)
            assert ask(home) == right
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        print(f"drained in {time.monotonic() - start:.1f} s")
