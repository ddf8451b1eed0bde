"""A Ray cluster of two nodes on this machine, as a process: orders on standard input.

`python -m bench.ray_nodes [GPUS]` prints one JSON line with the addresses when it is up; then each
line is an order: "remove" kills the second node, "raylet" its raylet alone, "add" starts another
node in its place, "gcs" kills Ray's control process. Each is answered with a line. The end of its
input ends the cluster. `Nodes` is the other end.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from bench.procs import descendants, processes_with

MARK: Final = "DIPTYCH_RAY_MARK"
"""In the environment of every process of a cluster: some outlive their parents."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


class Nodes:
    """The cluster's process; `env` is what every client of it needs."""

    def __init__(self, gpus: int = 0) -> None:
        self._mark = uuid.uuid4().hex
        self.env = {
            **os.environ,
            MARK: self._mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_DEDUP_LOGS": "0",  # all that workers say is in the job's log
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.ray_nodes", str(gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.env,
            text=True,
        )
        addresses = self._answer()
        self.address, self.dashboard = addresses["address"], addresses["dashboard"]

    def order(self, word: str) -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        below = list(descendants(self.process.pid))
        self.process.stdin.close()
        self.process.kill()  # without a control process nothing of it would end in order
        self.process.wait()
        below += processes_with(MARK, self._mark)
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                row: dict[str, Any] = json.loads(line)
                return row
        raise AssertionError(f"the cluster ended: {self.process.wait()}")


@contextmanager
def ray_nodes(gpus: int = 0) -> Iterator[Nodes]:
    """`gpus`: so many each node says that it has; none of them need exist."""
    nodes = Nodes(gpus)
    try:
        yield nodes
    finally:
        nodes.close()


def main() -> None:
    from ray.cluster_utils import Cluster

    port = free_port()
    gpus = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "num_gpus": gpus,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "object_store_memory": 80 << 20,
        },
    )
    second = cluster.add_node(num_cpus=1, num_gpus=gpus, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    say(address=cluster.address, dashboard=f"http://127.0.0.1:{port}")
    try:
        for line in sys.stdin:
            order = line.strip()
            if order == "remove":
                cluster.remove_node(second, allow_graceful=False)
            elif order == "raylet":
                second.kill_raylet(check_alive=False)
            elif order == "add":
                second = cluster.add_node(num_cpus=1, num_gpus=gpus, object_store_memory=80 << 20)
            elif order == "gcs":
                cluster.head_node.kill_gcs_server()
            say(done=order)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
