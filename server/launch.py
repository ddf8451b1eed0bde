"""Starting an engine's processes: as a child of a Python program, or as the server itself.

`start_engine` is for a caller that is its own API server (the Python `Engine`); `run_supervisor`
turns this process into the supervisor of `diptych serve`. Invariant: whatever ends the caller of
`start_engine` ends its engine too, at once.
"""

import logging
import select
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from diptych.engine.core.config import EngineOptions
from diptych.engine.core.errors import ConfigError, EngineDeadError, ModelLoadError
from diptych.server.boot import ApiBoot, ClusterBoot, SupervisorBoot
from diptych.server.run_dir import remove_run_dir
from diptych.server.spawn import spawn
from diptych.server.status import LaunchFailed, LaunchStatus, Listening, Progressed, Started
from diptych.server.supervisor import Supervisor

_PACKET_BYTES_MAX = 1 << 20
_CLOSE_S_MAX = 5.0


class Launched:
    """A running engine whose API server 0 is this process. `close` it, or use it in `with`."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._run_dir: Path | None = None
        self.boot: ApiBoot | None = None

    @property
    def api(self) -> ApiBoot:
        """Where to bind, whom to speak to, and the facts of the model."""
        assert self.boot is not None, "only after start_engine returned"
        return self.boot

    @property
    def supervisor_pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Readable once the engine is gone: the supervisor says nothing any more."""
        return self._control.fileno()

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends all processes of the engine and returns when they are gone. Idempotent."""
        with suppress(OSError):  # also when a fork of this process holds the socket too
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self._process.wait(_CLOSE_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._run_dir is not None:
            remove_run_dir(self._run_dir)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until_started(
        self,
        timeout_s: float,
        on_progress: Callable[[str], None],
        on_listening: Callable[[str], None] | None = None,
    ) -> None:
        """Raises what the supervisor reports, such as ModelLoadError, else EngineDeadError."""
        deadline_s = time.monotonic() + timeout_s
        while self.boot is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise EngineDeadError(f"The engine was not ready after {timeout_s:g} s.")
            if not select.select([self._control], [], [], left_s)[0]:
                continue
            packet = self._control.recv(_PACKET_BYTES_MAX)
            if not packet:
                status = self._process.wait()
                raise EngineDeadError(f"The supervisor ended while starting ({status}).")
            match msgspec.json.decode(packet, type=LaunchStatus):
                case Progressed(text, run_dir):
                    self._run_dir = Path(run_dir)
                    on_progress(text)
                case Listening(endpoint, run_dir):
                    self._run_dir = Path(run_dir)
                    if on_listening is not None:
                        on_listening(endpoint)
                case Started(boot):
                    self.boot = boot
                case LaunchFailed(kind, message):
                    raise _ERRORS.get(kind, EngineDeadError)(message)


_ERRORS = {error.__name__: error for error in (ConfigError, ModelLoadError, EngineDeadError)}


def start_engine(
    options: EngineOptions,
    *,
    timeout_s: float = 600.0,
    on_progress: Callable[[str], None] | None = None,
    log_level: str = "WARNING",
    cluster: ClusterBoot | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> Launched:
    """Starts scheduler and workers under a supervisor of their own; returns when all are up.

    With `cluster` other hosts may join; `on_listening` is called with the "HOST:PORT" for them.

    The caller then opens its channels at `launched.api` and calls `announce`.
    """
    options.verify()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    boot = SupervisorBoot(
        options=options, control_fd=theirs.fileno(), log_level=log_level, cluster=cluster
    )
    process = spawn("diptych.server.supervisor_main", boot, [theirs.fileno()])
    theirs.close()
    launched = Launched(process, ours)
    try:
        on_progress = on_progress or logging.getLogger("diptych").info
        launched.wait_until_started(timeout_s, on_progress, on_listening)
    except BaseException:
        launched.close()
        raise
    return launched


def run_supervisor(
    options: EngineOptions,
    api_target: str,
    *,
    num_apis: int = 1,
    settings: dict[str, object] | None = None,
    listen_fd: int | None = None,
    meters_fd: int | None = None,
    grace_s: float = 30.0,
    log_level: str = "INFO",
    cluster: ClusterBoot | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT (drain, then 0) or a failure that no restart can mend.

    api_target: "package.module:function", called with an `ApiBoot` in each API server process; it
    returns when a `Drain` that came over its channels is done. `settings` (JSON values),
    `listen_fd` and `meters_fd` reach it inside the `ApiBoot`. Returns the exit status.
    """
    options.verify()
    boot = SupervisorBoot(
        options=options,
        api_target=api_target,
        num_apis=num_apis,
        settings=settings or {},
        listen_fd=listen_fd,
        meters_fd=meters_fd,
        grace_s=grace_s,
        log_level=log_level,
        cluster=cluster,
    )
    return Supervisor(boot).run()
