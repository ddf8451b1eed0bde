"""What the Ray launcher is told, and which hosts follow from where Ray put its bundles. Pure.

Owns no state and knows nothing of Ray. Invariant: every bundle that has a node is one worker there;
a node's part is named by what it is, so that a changed part is another one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

BUNDLES_MAX: Final = 4096
POOLS: Final = ("prefill", "decode", "mixed")


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
    roles: list[str] = []  # elastic: the pool of each place for a worker, in order
    orders_fd: int | None = None  # elastic: where `RayOrder`s come, a line each
    lifeline_fd: int
    log_level: str = "INFO"


class RayOrder(msgspec.Struct, frozen=True):
    """From the head of elastic hosts; it says all anew each time."""

    count: int  # workers to have a place for, those included that are about to go
    given_back: list[str]  # places whose worker was retired, the newest last


class Part(msgspec.Struct, frozen=True, order=True):
    """What one node contributes, or one worker's bundle on it."""

    node: str  # Ray's id of it
    prefill: int
    decode: int
    mixed: int
    seat: int | None = None  # elastic: the bundle's number, given once
    devices: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of each worker, in the order of the pools

    @property
    def place(self) -> str:
        """The head lets a new agent of the same place replace the old one."""
        return f"ray:{self.node}" if self.seat is None else f"ray:{self.node}:{self.seat}"


def bundles(options: RayOptions, count: int) -> list[dict[str, float]]:
    """One per worker; what is 0 is not asked for."""
    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    one = {name: amount for name, amount in wanted.items() if amount > 0}
    return [dict(one) for _ in range(count)]


def lack_of_room(
    missing: Mapping[str, int],
    options: RayOptions,
    total: Mapping[str, float],
    free: Mapping[str, float],
) -> str:
    """What the log says while Ray has no place for `missing` workers by pool."""
    workers = ", ".join(f"{count} {pool}" for pool, count in missing.items())
    one = bundles(options, 1)[0]
    needs = " and ".join(f"{amount:g} {name}" for name, amount in one.items())
    has = " and ".join(
        f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name} free" for name in one
    )
    never = [name for name, amount in one.items() if amount > total.get(name, 0.0)]
    text = f"Ray has no room for these workers (yet): {workers}; each needs {needs} of one node"
    text += f", and its living nodes have {has}"
    if never:
        text += f": no node that is there can ever hold one, for want of {' and '.join(never)}"
    return text


def parts(
    placed: Mapping[str, Sequence[str]],
    living: Sequence[str],
    devices: Mapping[str, Sequence[str]] | None = None,
) -> list[Part]:
    """`placed`: pool -> the node of each bundle ("" while it has none); `living`: nodes;
    `devices`: pool -> what each bundle has of its node's GPUs, if it has any."""
    nodes = sorted({node for found in placed.values() for node in found} & set(living))
    found = []
    for node in nodes:
        at = {p: [i for i, n in enumerate(placed.get(p, ())) if n == node] for p in POOLS}
        seen = [devices[pool][i] for pool in POOLS for i in at[pool]] if devices else []
        prefill, decode, mixed = (len(at[pool]) for pool in POOLS)
        found.append(Part(node, prefill, decode, mixed, devices=tuple(seen)))
    return found


def known_parts(
    placed: Mapping[str, Sequence[str]],
    living: Sequence[str],
    devices: Mapping[str, Sequence[str | None]],
    running: Sequence[Part],
) -> list[Part]:
    """`parts` of the nodes whose bundles all have a known share of the GPUs; `devices`: None where
    it is not known. Other nodes stay as they are in `running`: a part that grows bundle by bundle
    would start and end its workers once for each."""
    waiting = {
        node
        for pool, nodes in placed.items()
        for node, seen in zip(nodes, devices[pool], strict=True)
        if node and seen is None
    }
    found = {pool: ["" if node in waiting else node for node in placed[pool]] for pool in placed}
    seen = {pool: [one or "" for one in devices[pool]] for pool in placed}
    stay = [part for part in running if part.node in waiting and part.node in living]
    return sorted(parts(found, living, seen) + stay)


class Seats:
    """Elastic: a bundle for each worker, of numbers that are never given twice."""

    def __init__(self, roles: Sequence[str]) -> None:
        self.roles: dict[int, str] = {}  # of each seat that there is
        self._turn = list(roles)
        self._next = 0

    def obey(
        self, order: RayOrder, nodes: Mapping[int, str], now_at: Mapping[str, int]
    ) -> tuple[list[int], list[int]]:
        """(new seats, seats to give back). `nodes`: where each seat's bundle is, "" while it has
        no place; `now_at`: the seats of the places that the head knows.

        Of more than are wanted only those go that Ray found no room for: the head says itself which
        worker leaves."""
        gone = [now_at[place] for place in order.given_back if now_at.get(place) in self.roles]
        waiting = [seat for seat in self.roles if seat not in gone and not nodes.get(seat)]
        excess = len(self.roles) - len(gone) - order.count
        gone += sorted(waiting, reverse=True)[: max(0, excess)]
        for seat in gone:
            del self.roles[seat]
        new = []
        while len(self.roles) < order.count:
            self.roles[self._next] = self._missing_role()
            new.append(self._next)
            self._next += 1
        return new, gone

    def _missing_role(self) -> str:
        """The first place whose kind of worker there is not yet."""
        here = Counter(self.roles.values())
        for role in self._turn:
            if here[role] <= 0:
                return role
            here[role] -= 1
        return self._turn[-1]

    def parts(
        self,
        nodes: Mapping[int, str],
        living: Sequence[str],
        devices: Mapping[int, str] | None = None,
    ) -> list[Part]:
        """One of each seat that is on a living node."""
        return [
            Part(
                nodes[seat],
                prefill=int(role == "prefill"),
                decode=int(role == "decode"),
                mixed=int(role == "mixed"),
                seat=seat,
                devices=(devices[seat],) if devices else (),
            )
            for seat, role in self.roles.items()
            if nodes.get(seat) in living
        ]
