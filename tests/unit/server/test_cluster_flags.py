"""The flags of several hosts, the key file, and which hosts follow from Ray's placement."""

import argparse
from pathlib import Path

import pytest

from diptych.engine.core.errors import ConfigError
from diptych.server.boot import ClusterBoot
from diptych.server.cli import build_parser
from diptych.server.cluster_flags import cluster_boot, read_key, read_or_make_key, split_address
from diptych.server.ray_plan import Part, RayOptions, bundles, parts
from diptych.transfer.network import public_of


def parse(*words: str) -> argparse.Namespace:
    return build_parser("serve").parse_args(["serve", *words])


def boot(*words: str) -> ClusterBoot | None:
    return cluster_boot(parse(*words))


def test_one_host_has_no_cluster() -> None:
    assert boot("--prefill", "2", "--decode", "2") is None


def test_ray_brings_all_workers(tmp_path: Path) -> None:
    made = boot(str(tmp_path), "--ray", "--ray-gpus-per-worker", "0.5", "--ray-strategy", "spread")
    assert made is not None
    assert made.ray == RayOptions(gpus_per_worker=0.5, strategy="SPREAD")
    assert not made.local_workers
    assert made.model == str(tmp_path)
    other = boot("org/name", "--ray", "10.0.0.1:6379", "--cluster-address", "127.0.0.9")
    assert other is not None
    assert other.ray == RayOptions(address="10.0.0.1:6379")
    assert (other.model, other.network.ip) == ("org/name", "127.0.0.9")
    assert other.network.secret != made.network.secret


def test_hosts_that_join_need_the_key_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    words = ("--cluster-address", "127.0.0.1:7000", "--cluster-key-file", str(path))
    first, again = boot(*words), boot(*words, "--no-local-workers")
    assert first is not None
    assert again is not None
    assert (first.network, first.port, first.local_workers) == (again.network, 7000, True)
    assert not again.local_workers
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_of(read_key(path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cluster-address", "127.0.0.1"], "--cluster-key-file"),
        (["--cluster-key-file", "key"], "--cluster-address"),
        (["--no-local-workers"], "--cluster-address"),
        (["--inline", "--ray"], "--inline"),
        (["--ray", "--ray-cpus-per-worker", "0"], "CPU or GPU"),
        (["--ray", "--ray-api-port", "8001", "--autoscale", "0:2"], "--ray-api-port"),
        (["--ray", "--ray-cpus-per-worker", "-1"], "negative"),
        (["--ray", "--ray-gpus-per-worker", "1.5"], "whole ones"),
        (["--ray", "--cluster-address", "0.0.0.0:1"], "the one address"),
        (["--ray", "--cluster-address", "somewhere"], "no IP address"),
    ],
)
def test_what_cannot_work_is_said(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        boot(*words)


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    read_or_make_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)
    path.chmod(0o600)
    path.write_text("something else")
    with pytest.raises(ConfigError, match="40 characters"):
        read_key(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_key(tmp_path / "none")


def test_addresses() -> None:
    assert split_address("10.0.0.1") == ("10.0.0.1", 0)
    assert split_address("10.0.0.1:70") == ("10.0.0.1", 70)
    assert split_address("[fd00::2]:70") == ("fd00::2", 70)


def test_a_node_has_a_part_for_each_bundle_that_is_on_it() -> None:
    placed = {"prefill": ["a", "b", ""], "decode": ["b", "b"], "mixed": ["lost"]}
    assert parts(placed, ["a", "b", "idle"]) == [Part("a", 1, 0, 0), Part("b", 1, 2, 0)]
    assert parts({}, ["a"]) == []
    assert bundles(RayOptions(cpus_per_worker=2, gpus_per_worker=0.25), 2) == [
        {"CPU": 2, "GPU": 0.25},
        {"CPU": 2, "GPU": 0.25},
    ]
    assert bundles(RayOptions(), 1) == [{"CPU": 1.0}]
