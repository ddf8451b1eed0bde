"""The container and cluster files: they parse, and say what the documentation says about them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych import __version__
from diptych.server.cli import build_parser
from diptych.server.cluster_flags import cluster_boot

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
)
JOB = next(document for document in DOCUMENTS if document["kind"] == "RayJob")
CLUSTER = JOB["spec"]["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]


def test_every_document_is_an_object_of_kubernetes() -> None:
    kinds = {(d["apiVersion"], d["kind"]) for d in DOCUMENTS}
    assert kinds == {
        ("ray.io/v1", "RayJob"),
        ("v1", "Service"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
    }
    assert all(d["metadata"]["name"].startswith("diptych") for d in DOCUMENTS)


def test_the_entrypoint_is_a_command_of_ours() -> None:
    program, command, *words = JOB["spec"]["entrypoint"].split()
    assert (program, command) == ("diptych", "serve")
    args = build_parser("serve").parse_args([command, *words])
    boot = cluster_boot(args)
    assert boot is not None
    assert boot.ray is not None
    assert not boot.local_workers
    per_node = GROUPS[1]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    room = int(per_node) // boot.ray.cpus_per_worker * GROUPS[1]["replicas"]
    assert args.prefill + args.decode <= room


@pytest.mark.parametrize("group", GROUPS, ids=["head", "workers"])
def test_pods_are_confined(group: dict[str, Any]) -> None:
    spec = group["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    (container,) = spec["containers"]
    assert container["image"] == f"diptych:{__version__}"
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    assert not any("KEY" in row["name"] and "value" in row for row in container.get("env", []))


def test_ray_is_closed() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert CLUSTER["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    policy = next(d for d in DOCUMENTS if d["kind"] == "NetworkPolicy")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    assert all(labels.items() <= g["template"]["metadata"]["labels"].items() for g in GROUPS)
    open_ports = [rule["ports"] for rule in policy["ingress"] if "from" not in rule]
    assert open_ports == [[{"port": 8000, "protocol": "TCP"}]]


def test_the_image() -> None:
    """What hadolint would ask for: pinned bases, no cached packages, no root, what is copied is."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    words = [line.split() for line in lines if line.strip()]
    bases = [line[1] for line in words if line[0] == "FROM"]
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", base) for base in bases)
    for line in words:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            assert all((ROOT / source).exists() for source in line[1:-1]), line
        if "apt-get" in line:
            joined = " ".join(line)
            assert "--no-install-recommends" in joined
            assert "rm -rf /var/lib/apt/lists/*" in joined
    users = [line[1] for line in words if line[0] == "USER"]
    assert users[-1:] == ["diptych"]
    assert "RAY_AUTH_MODE=token" in text
    assert not re.search(r"(?i)(secret|token|key)\s*=\s*[0-9a-f]{8}", text)
    commands = {line[0] for line in words}
    assert commands <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "CMD"}
