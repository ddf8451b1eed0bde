"""For tests of real processes: a tiny model, waiting on conditions, and who is still there."""

import ctypes
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.procs import processes_with
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions
from diptych.server.process_table import ProcessRow, read_processes

WAIT_S = 30.0
LOOK_MS = 5
MARK = "DIPTYCH_TEST_MARK"
_IN_MOVED_TO = 0x80
_LIBC = ctypes.CDLL(None, use_errno=True)


def write_tiny_model(folder: Path) -> Path:
    """A Llama of two layers, to be served with dummy weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_options(
    folder: Path, *, hang_s: float = 3.0, num_blocks: int = 256, prefill: int = 1, decode: int = 1
) -> EngineOptions:
    return EngineOptions(
        model=ModelOptions(path=str(write_tiny_model(folder)), load_format="dummy"),
        cache=CacheOptions(num_blocks=num_blocks),
        prefill=prefill,
        decode=decode,
        threads=1,
        hang_s=hang_s,
    )


def wait_for(
    what: str, condition: Callable[[], bool], timeout_s: float = WAIT_S, *fds: int
) -> None:
    """Looks when one of `fds` has news, and now and then; fails with `what` after the timeout."""
    poller, until_s = select.poll(), time.monotonic() + timeout_s
    for fd in fds:
        poller.register(fd, select.POLLIN)
    while not condition():
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s: {what}"
        for fd, _ in poller.poll(LOOK_MS):
            os.read(fd, 4096)


@contextmanager
def changes(folder: Path) -> Iterator[int]:
    """A descriptor that has news whenever a file in the folder is replaced."""
    fd = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        watch = _LIBC.inotify_add_watch(fd, bytes(folder), _IN_MOVED_TO)
        assert watch >= 0, os.strerror(ctypes.get_errno())
        yield fd
    finally:
        os.close(fd)


def wait_gone(pid: int, end: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Until a process is over that `end` ends; it need not be a child."""
    pidfd = os.pidfd_open(pid)
    try:
        end()
        assert select.select([pidfd], [], [], timeout_s)[0], f"{pid} lives after {timeout_s:g} s"
    finally:
        os.close(pidfd)


def state_of(pid: int) -> str:
    """As `ps` has it: "R", "S", "T" (stopped), "Z" (dead, not reaped), ...; "X": it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


def marked_processes(mark: str) -> list[str]:
    """Living processes, but this one, whose environment holds the mark."""
    found = processes_with(MARK, mark)
    return [f"{pid} {comm}" for pid, comm in found.items() if pid != os.getpid()]


def up(run_dir: Path, name: str, epoch: int) -> bool:
    row = read_processes(run_dir).get(name)
    return row is not None and row.epoch == epoch and row.state == "up"


def kill(run_dir: Path, name: str, number: signal.Signals = signal.SIGKILL) -> ProcessRow:
    """Sends the signal; returns the row of the victim."""
    row = read_processes(run_dir)[name]
    assert row.pid is not None
    os.kill(row.pid, number)
    return row


def kill_and_time(run_dir: Path, name: str, number: signal.Signals = signal.SIGKILL) -> float:
    """Seconds from the signal until its end was seen; returns when the next one is up."""
    start_ns = time.monotonic_ns()
    victim = kill(run_dir, name, number)
    seen: list[int] = []

    def replaced() -> bool:
        row = read_processes(run_dir).get(name)
        if row is not None and row.epoch > victim.epoch:
            seen.append(row.changed_ns)
        return bool(seen)

    with changes(run_dir) as fd:
        wait_for(f"{name} is seen dead", replaced, WAIT_S, fd)
        wait_for(f"{name} is up again", lambda: up(run_dir, name, victim.epoch + 1), WAIT_S, fd)
    return (seen[0] - start_ns) / 1e9
