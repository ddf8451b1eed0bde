"""What the Ray launcher is told, and which hosts follow from where Ray put its bundles. Pure.

Owns no state and knows nothing of Ray. Invariant: every bundle that has a node is one worker there;
a node's part is named by what it is, so that a changed part is another one.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

BUNDLES_MAX: Final = 4096


class RayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Of `diptych serve --ray`."""

    address: str = "auto"
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    strategy: str = "PACK"  # how Ray spreads the workers of one pool over nodes
    api_host: str = "127.0.0.1"
    api_port: int | None = None  # of an API server on every node that has workers; None: no such


class RayBoot(msgspec.Struct, frozen=True, kw_only=True):
    """For the launcher process, on its standard input."""

    ray: RayOptions
    head: str  # "HOST:PORT"
    secret: str
    model: str  # as the user called it, to be found on each host
    counts: dict[str, int]  # pool ("prefill", "decode", "mixed") -> workers
    lifeline_fd: int
    log_level: str = "INFO"


class Part(msgspec.Struct, frozen=True, order=True):
    """What one node contributes."""

    node: str  # Ray's id of it
    prefill: int
    decode: int
    mixed: int

    @property
    def place(self) -> str:
        """The head lets a new agent of the same place replace the old one."""
        return f"ray:{self.node}"


def bundles(options: RayOptions, count: int) -> list[dict[str, float]]:
    """One per worker; what is 0 is not asked for."""
    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    one = {name: amount for name, amount in wanted.items() if amount > 0}
    return [dict(one) for _ in range(count)]


def parts(placed: Mapping[str, Sequence[str]], living: Sequence[str]) -> list[Part]:
    """`placed`: pool -> the node of each bundle ("" while it has none); `living`: nodes."""
    nodes = sorted({node for found in placed.values() for node in found} & set(living))
    counted = {pool: list(found) for pool, found in placed.items()}
    return [
        Part(
            node,
            counted.get("prefill", []).count(node),
            counted.get("decode", []).count(node),
            counted.get("mixed", []).count(node),
        )
        for node in nodes
    ]
