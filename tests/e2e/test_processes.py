"""Real processes, killed one by one: what must come back comes back, and nothing is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from diptych.engine.core.config import EngineOptions
from diptych.engine.core.errors import EngineDeadError, ModelLoadError
from diptych.engine.core.params import SamplingParams
from diptych.server.launch import Launched, start_engine
from diptych.server.process_table import read_processes
from diptych.server.remote_client import RemoteClient
from diptych.server.spawn import python_environment
from tests.support.processes import (
    MARK,
    WAIT_S,
    changes,
    kill,
    kill_and_time,
    marked_processes,
    tiny_options,
    up,
    wait_for,
)

DETECT_S_MAX = 0.5
PROMPT = [5 + i * 7 % 200 for i in range(90)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A mark that all processes of the test carry; at its end none of them may be left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # run directories of others are not our business
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    segments = set(os.listdir("/dev/shm"))
    folders = run_dirs()
    yield mark
    wait_for("no process is left", lambda: not marked_processes(mark), 5.0)
    assert set(os.listdir("/dev/shm")) <= segments
    wait_for("no run directory is left", lambda: run_dirs() <= folders, 5.0)


def run_dirs() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("diptych-*"))


@asynccontextmanager
async def client_of(launched: Launched) -> AsyncIterator[RemoteClient]:
    client = RemoteClient(launched.api)
    try:
        async with asyncio.timeout(WAIT_S):
            while not client.health().ok:
                await asyncio.sleep(0.002)
        yield client
    finally:
        await client.close()


async def ask(
    client: RemoteClient, name: str, disturb: Callable[[], None] | None = None, after: int = 40
) -> list[int]:
    """The answer to PROMPT; `disturb` is called once when `after` tokens have come."""
    ids: list[int] = []
    async with asyncio.timeout(WAIT_S):
        async for delta in client.stream(name, PROMPT, PARAMS):
            assert delta.first_index == len(ids)
            ids += delta.ids
            if disturb is not None and len(ids) >= after:
                disturb()
                disturb = None
    return ids


def with_engine(options: EngineOptions, scenario: Callable[[Launched], None]) -> None:
    with start_engine(options) as launched:
        scenario(launched)


def test_streams_and_leaves_nothing(tmp_path: Path, clean: str) -> None:
    async def scenario(launched: Launched) -> None:
        async with client_of(launched) as client:
            first, second = await asyncio.gather(ask(client, "a"), ask(client, "b"))
            assert first == second
            assert len(first) == 160
            names = set(read_processes(launched.api.path))
            assert names == {"scheduler0", "worker0", "worker1", "api0", "warm"}

    with_engine(tiny_options(tmp_path), lambda launched: asyncio.run(scenario(launched)))


@pytest.mark.parametrize("name", ["worker0", "worker1", "scheduler0"])
def test_killed_under_load_comes_back_and_no_token_changes(
    tmp_path: Path, clean: str, name: str
) -> None:
    async def scenario(launched: Launched) -> None:
        run_dir = launched.api.path
        async with client_of(launched) as client:
            calm = await ask(client, "calm")
            for round_ in range(3):
                kills: list[asyncio.Task[float]] = []

                def disturb(kills: list[asyncio.Task[float]] = kills) -> None:
                    work = asyncio.to_thread(kill_and_time, run_dir, name)
                    kills.append(asyncio.create_task(work))

                ids = await ask(client, f"r{round_}", disturb)
                seen_s = await kills[0]
                print(f"{name} round {round_}: death seen after {seen_s * 1e3:.1f} ms")
                assert seen_s <= DETECT_S_MAX
                assert ids == calm
            assert await ask(client, "after") == calm

    with_engine(tiny_options(tmp_path), lambda launched: asyncio.run(scenario(launched)))


def test_workers_survive_their_warm_parent(tmp_path: Path, clean: str) -> None:
    async def scenario(launched: Launched) -> None:
        run_dir = launched.api.path
        async with client_of(launched) as client:
            calm = await ask(client, "calm")
            before = read_processes(run_dir)
            kill(run_dir, "warm")
            assert await ask(client, "meanwhile") == calm
            await asyncio.to_thread(kill_and_time, run_dir, "worker1")  # waits for the next warm
            after = read_processes(run_dir)
            assert after["worker0"] == before["worker0"]
            assert after["warm"].pid != before["warm"].pid
            assert await ask(client, "after") == calm

    with_engine(tiny_options(tmp_path), lambda launched: asyncio.run(scenario(launched)))


def test_worker_and_warm_parent_killed_together(tmp_path: Path, clean: str) -> None:
    def scenario(launched: Launched) -> None:
        run_dir = launched.api.path
        with changes(run_dir) as fd:
            kill(run_dir, "warm")
            kill(run_dir, "worker0")
            wait_for("worker0 is up again", lambda: up(run_dir, "worker0", 2), WAIT_S, fd)

    with_engine(tiny_options(tmp_path), scenario)


def test_a_worker_that_stands_still_is_replaced(tmp_path: Path, clean: str) -> None:
    def scenario(launched: Launched) -> None:
        hung_s = kill_and_time(launched.api.path, "worker1", signal.SIGSTOP)
        print(f"hang seen after {hung_s:.2f} s (hang_s 1.5)")
        assert 1.4 < hung_s < 3.0

    with_engine(tiny_options(tmp_path, hang_s=1.5), scenario)


def test_nothing_outlives_the_supervisor(tmp_path: Path, clean: str) -> None:
    with start_engine(tiny_options(tmp_path)) as launched:
        os.kill(launched.supervisor_pid, signal.SIGKILL)
        wait_for("all processes ended", lambda: not marked_processes(clean), 2.0)
        wait_for("the run directory is gone", lambda: not launched.api.path.exists(), 2.0)


def test_nothing_outlives_the_program(tmp_path: Path, clean: str) -> None:
    program = (
        "import msgspec, os, sys, signal\n"
        "from diptych.engine.core.config import EngineOptions\n"
        "from diptych.server.launch import start_engine\n"
        "start_engine(msgspec.json.decode(sys.stdin.buffer.read(), type=EngineOptions))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=msgspec.json.encode(tiny_options(tmp_path)),
        env=python_environment(),
        timeout=WAIT_S,
    )
    assert ended.returncode == -signal.SIGKILL
    wait_for("all processes ended", lambda: not marked_processes(clean), 2.0)


def serve(options: EngineOptions, target: str) -> subprocess.Popen[bytes]:
    program = (
        "import msgspec, sys\n"
        "from diptych.engine.core.config import EngineOptions\n"
        "from diptych.server.launch import run_supervisor\n"
        "options = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineOptions)\n"
        "status = run_supervisor(options, sys.argv[1], num_apis=2, grace_s=5.0)\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, target], stdin=subprocess.PIPE, env=python_environment()
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(options))
    process.stdin.close()
    return process


@pytest.mark.parametrize("signals", [1, 2])
def test_serves_with_api_servers_and_drains(tmp_path: Path, clean: str, signals: int) -> None:
    before = run_dirs()
    process = serve(tiny_options(tmp_path), "tests.support.api_stub:serve")
    try:
        wait_for("a run directory", lambda: bool(run_dirs() - before))
        (run_dir,) = run_dirs() - before
        wait_for("both API servers", lambda: up(run_dir, "api0", 1) and up(run_dir, "api1", 1))
        seen_s = kill_and_time(run_dir, "api1")
        print(f"api1: death seen after {seen_s * 1e3:.1f} ms")
        assert seen_s <= DETECT_S_MAX
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


def test_an_api_server_that_cannot_start_ends_the_server(tmp_path: Path, clean: str) -> None:
    process = serve(tiny_options(tmp_path), "tests.support.api_stub:fail")
    assert process.wait(WAIT_S) == 1


def test_a_warm_parent_that_dies_while_loading_is_an_error_of_the_start(
    tmp_path: Path, clean: str
) -> None:
    before = run_dirs()

    def kill_warm(_: str) -> None:
        (run_dir,) = run_dirs() - before
        wait_for("the warm parent", lambda: "warm" in read_processes(run_dir))
        kill(run_dir, "warm")

    with pytest.raises(EngineDeadError, match="loads the model"):
        start_engine(tiny_options(tmp_path), on_progress=kill_warm)


def test_errors_of_the_start_reach_the_caller(tmp_path: Path, clean: str) -> None:
    options = tiny_options(tmp_path)
    model = msgspec.structs.replace(options.model, load_format="auto")
    real = msgspec.structs.replace(options, model=model)
    with pytest.raises(ModelLoadError, match="safetensors"):
        start_engine(real)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        start_engine(options)
    with pytest.raises(EngineDeadError, match="not ready after"):
        start_engine(tiny_options(tmp_path), timeout_s=0.01)
