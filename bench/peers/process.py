"""A server under measurement: started once, halted while another one has its turn.

Owns the processes of that server. Invariant: outside its turn a server is stopped by signal
(SIGSTOP to the whole tree), so that it can neither spin nor answer; what it used nevertheless is
counted and reported.
"""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from bench.peers.engines import Engine
from bench.procs import descendants
from bench.serving import free_port

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOP_S_MAX = 30.0


@dataclass(frozen=True)
class Cores:
    """A reading of the machine's CPU clocks."""

    at_s: float
    busy_s: float  # of all cores, time that the hypervisor took included
    own_s: float  # this process

    @classmethod
    def now(cls) -> "Cores":
        user, nice, system, _, _, irq, soft, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + soft + steal
        return cls(time.perf_counter(), busy / _TICKS_PER_S, time.process_time())

    def foreign_share(self, server_s: float) -> float:
        """Since this reading: the cores' time used by neither us nor a server that used
        `server_s`. Clocks tick in hundredths: of a short turn it is a rough number."""
        now = Cores.now()
        foreign_s = now.busy_s - self.busy_s - (now.own_s - self.own_s) - server_s
        return max(0.0, foreign_s) / (now.at_s - self.at_s) / (os.cpu_count() or 1)


class Server:
    """One engine's server on a free loopback port."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self.engine = engine
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = engine.command(self.port)
        self.idle_cpu_s = 0.0  # used while it was not its turn
        self._halted_cpu_s: float | None = None
        self._log = log
        with log.open("wb") as sink:
            self._started_s = time.perf_counter()
            self._process = subprocess.Popen(
                self.command,
                stdout=sink,
                stderr=sink,
                env=os.environ | engine.environment,
                cwd=log.parent,  # a folder of ours named as a package of theirs would hide it
                start_new_session=True,
            )

    def await_ready(self, timeout_s: float) -> float:
        """Seconds from the start of the process to the first good answer of /health."""
        while time.perf_counter() - self._started_s < timeout_s:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                address = self.url + self.engine.health
                with urllib.request.urlopen(address, timeout=5) as answer:
                    if answer.status == 200:
                        return time.perf_counter() - self._started_s
            time.sleep(0.01)
        tail = self._log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.engine.name} did not start: {tail}")

    def cpu_s(self) -> float:
        """CPU seconds of its living processes so far."""
        return sum(_cpu_s(pid) for pid in self._pids())

    def halt(self) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._halted_cpu_s = self.cpu_s()

    def wake(self) -> None:
        if self._halted_cpu_s is not None:
            self.idle_cpu_s += self.cpu_s() - self._halted_cpu_s
            self._halted_cpu_s = None
        for pid in reversed(self._pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """SIGTERM, then SIGKILL to whatever is left of the tree."""
        self.wake()
        pids = self._pids()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _pids(self) -> list[int]:
        return [self._process.pid, *descendants(self._process.pid)]


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
