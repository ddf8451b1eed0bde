"""A Ray cluster of two nodes on this machine, as a process: orders on standard input.

`python -m tests.support.ray_nodes` prints one JSON line with the addresses when it is up; then each
line is an order: "remove" kills the second node, "add" starts another one, "gcs" kills Ray's
control process. Each is answered with a line. The end of its input ends the cluster.
"""

import json
import socket
import sys
from typing import Any

from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def main() -> None:
    port = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "object_store_memory": 80 << 20,
        },
    )
    second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    say(address=cluster.address, dashboard=f"http://127.0.0.1:{port}")
    try:
        for line in sys.stdin:
            order = line.strip()
            if order == "remove":
                cluster.remove_node(second, allow_graceful=False)
            elif order == "add":
                second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
            elif order == "gcs":
                cluster.head_node.kill_gcs_server()
            say(done=order)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
