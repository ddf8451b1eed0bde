"""The flags of a server on several hosts: with Ray, or with hosts that join by themselves.

Owns the key file. Invariant: a key is never on a command line, and its file is its owner's alone.
"""

import argparse
import os
import socket
import stat
from pathlib import Path
from typing import Final

from diptych.engine.core.errors import ConfigError
from diptych.server.boot import ClusterBoot
from diptych.server.ray_plan import RayOptions
from diptych.transfer.network import Network, new_secret, public_of

_ELSEWHERE: Final = "192.0.2.1"  # documentation network: asked for a route, never reached


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    ray = parser.add_argument_group("Ray cluster").add_argument
    ray(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="let Ray place the workers (default address: that of this node's cluster)",
    )
    ray("--ray-cpus-per-worker", type=float, default=1.0, metavar="N", help="fractions count too")
    ray("--ray-gpus-per-worker", type=float, default=0.0, metavar="N", help="fractions count too")
    ray(
        "--ray-strategy",
        choices=["pack", "spread", "strict-pack", "strict-spread"],
        default="pack",
        help="of the placement group of each pool (default: %(default)s)",
    )
    ray(
        "--ray-api-port",
        type=int,
        metavar="PORT",
        help="an API server on every node with workers too, there at --host",
    )
    hosts = parser.add_argument_group("several hosts").add_argument
    hosts(
        "--cluster-address",
        metavar="IP[:PORT]",
        help="listen there for hosts that run `diptych join` (with --ray: the address of this"
        " host for the others; default: that of its default route)",
    )
    hosts(
        "--cluster-key-file",
        type=Path,
        metavar="FILE",
        help="the key that hosts need to join; made if there is none",
    )
    hosts(
        "--no-local-workers",
        action="store_true",
        help="hosts that join bring all workers",
    )


def cluster_boot(args: argparse.Namespace) -> ClusterBoot | None:
    """None: this host alone. Raises ConfigError."""
    if args.inline and (args.ray or args.cluster_address):
        raise ConfigError("--inline is one process: it has no hosts")
    if args.ray is not None:
        ip, port = split_address(args.cluster_address or default_ip())
        if args.ray_cpus_per_worker < 0 or args.ray_gpus_per_worker < 0:
            raise ConfigError("resources of a worker cannot be negative")
        if not args.ray_cpus_per_worker + args.ray_gpus_per_worker:
            raise ConfigError("a worker needs CPU or GPU resources of Ray")
        if args.ray_gpus_per_worker > 1 and args.ray_gpus_per_worker % 1:
            raise ConfigError(
                "of more than one GPU a worker takes whole ones: see --ray-gpus-per-worker"
            )
        if args.autoscale is not None and args.ray_api_port is not None:
            raise ConfigError("--ray-api-port needs nodes that stay: not with --autoscale")
        options = RayOptions(
            address=args.ray,
            cpus_per_worker=args.ray_cpus_per_worker,
            gpus_per_worker=args.ray_gpus_per_worker,
            strategy=args.ray_strategy.upper().replace("-", "_"),
            api_host=args.host,
            api_port=args.ray_api_port,
        )
        network = Network(ip, new_secret())
        folder = Path(args.model or "").expanduser()
        model = str(folder.resolve()) if args.model and folder.is_dir() else args.model or ""
        return ClusterBoot(
            network=network, port=port, local_workers=False, ray=options, model=model
        )
    if args.cluster_address is None:
        if args.no_local_workers or args.cluster_key_file:
            raise ConfigError("say where other hosts join: --cluster-address IP[:PORT]")
        return None
    if args.cluster_key_file is None:
        raise ConfigError("--cluster-address needs --cluster-key-file FILE: the hosts' key")
    ip, port = split_address(args.cluster_address)
    secret = read_or_make_key(args.cluster_key_file)
    return ClusterBoot(
        network=Network(ip, secret), port=port, local_workers=not args.no_local_workers
    )


def split_address(text: str) -> tuple[str, int]:
    """ "10.0.0.1", "10.0.0.1:7000", "[fd00::2]:7000": address and port, 0 for any."""
    if text.startswith("["):
        ip, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        ip, _, port = text.partition(":")
    try:
        number = int(port or 0)
        socket.getaddrinfo(ip, number, flags=socket.AI_NUMERICHOST)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{text!r} is no IP address of this host, with or without port"
        ) from error
    if ip in ("0.0.0.0", "::"):
        raise ConfigError(f"{text!r}: name the one address of this host that the others reach")
    return ip, number


def default_ip() -> str:
    """This host's address on its default route; loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_ELSEWHERE, 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def read_or_make_key(path: Path) -> str:
    """Raises ConfigError for a file that others may read, or that holds no key."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return read_key(path)
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error}") from error
    secret = new_secret()
    with os.fdopen(fd, "w") as file:
        file.write(secret + "\n")
    return secret


def read_key(path: Path) -> str:
    """Raises ConfigError."""
    try:
        mode = path.stat().st_mode
        secret = path.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the cluster's key: {error}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
    public_of(secret)
    return secret
