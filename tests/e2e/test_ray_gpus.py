"""Fractions of GPUs that two Ray nodes say they have: who holds them, and what workers see."""

import asyncio
import json
import re
import subprocess
import sys
import time

import httpx
import pytest

from bench.ray_nodes import Nodes, free_port, ray_nodes
from bench.raylets import answer, until_workers
from tests.e2e.test_ray import WAIT_S, submit

_LOOK = """
import json, sys, ray
from ray.job_submission import JobSubmissionClient
from ray.util.placement_group import placement_group_table
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
client = JobSubmissionClient(sys.argv[1])
jobs = [job.submission_id for job in client.list_jobs() if job.submission_id]
logs = "".join(client.get_job_logs(job) for job in jobs)
table = placement_group_table().values()
groups = [(g["name"], g["state"], list(g["bundles"].values())) for g in table]
print(json.dumps([groups, logs]))
"""


def look(nodes: Nodes) -> tuple[list[tuple[str, str, list[dict[str, float]]]], str]:
    """(placement groups, what the job said)."""
    env = {**nodes.env, "RAY_ADDRESS": nodes.address}
    words = [sys.executable, "-c", _LOOK, nodes.dashboard]
    done = subprocess.run(words, env=env, timeout=60, capture_output=True, text=True, check=True)
    groups, logs = json.loads(done.stdout.splitlines()[-1])
    return groups, logs


def until_said(nodes: Nodes, pattern: str, count: int) -> set[tuple[str, ...]]:
    """Once so many different things were said."""
    until_s = time.monotonic() + WAIT_S
    while len(found := set(re.findall(pattern, look(nodes)[1]))) < count:
        assert time.monotonic() < until_s, look(nodes)
    return found


async def serves(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        await until_workers(client, [[0, 0, 100]])
        assert await answer(client, "two and two", 8)


@pytest.mark.timeout(240)
def test_each_worker_sees_the_gpus_of_its_bundle() -> None:
    """One GPU on each node: a fraction of it for each of three workers, and no room for a whole."""
    port = free_port()
    words = ["serve", "--ray", "--threads", "1", "--ray-cpus-per-worker", "0"]
    with ray_nodes(gpus=1) as nodes:
        fractions = ["--prefill", "1", "--decode", "2", "--ray-gpus-per-worker", "0.5"]
        command = [sys.executable, "-m", "diptych.server.cli", *words]
        submit(nodes, *command, *fractions, "--port", str(port))
        asyncio.run(serves(port))
        groups, _ = look(nodes)
        held = {
            name.split("-")[1]: bundles for name, state, bundles in groups if state == "CREATED"
        }
        assert held == {"prefill": [{"GPU": 0.5}], "decode": [{"GPU": 0.5}, {"GPU": 0.5}]}
        # Three workers, by name: their numbers go on where Ray moved a bundle.
        seen = until_said(nodes, r"(worker\d+)\.1\b.*sees the GPUs (\S+)", 3)
        assert {devices for _, devices in seen} == {"0"}
        more = ["--mixed", "1", "--ray-gpus-per-worker", "2", "--port", str(free_port())]
        submit(nodes, *command, *more)
        said = until_said(
            nodes, r"no room for these workers \(yet\): 1 mixed; each needs 2 GPU (.*)", 1
        )
        assert all("GPU free" in rest for rest in said)
