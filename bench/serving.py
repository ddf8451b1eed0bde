"""`diptych serve` as a child process, for benches and end-to-end tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diptych.server.spawn import python_environment

_READY_S_MAX = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Serving:
    """A server on a free loopback port; ready when the `with` block begins, gone when it ends."""

    def __init__(self, model: Path | str | None, *flags: str, log: Path | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        words = [] if model is None else [str(model)]
        command = [sys.executable, "-P", "-m", "diptych.server.cli", "serve", *words]
        command += ["--port", str(self.port), *flags]
        self._log = log or Path(os.devnull)
        with self._log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=python_environment()
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _READY_S_MAX
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self.status("/health") == 200:
                return self
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"the server did not start: {self._log.read_text()[-2000:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM, which drains; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    def status(self, path: str) -> int | None:
        """The HTTP status of a GET, None where nobody listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return None

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            text: str = response.read().decode()
            return text

    def post(self, path: str, body: object, timeout_s: float = 120.0) -> tuple[int, Any]:
        """Status and JSON of the answer; `body` bytes are sent as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
