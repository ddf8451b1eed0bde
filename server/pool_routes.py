"""Which way blocks take between the pools of a host, decided once per worker and pair of pools.

Owns the choice and its reason, which is logged. Invariants: a worker serves its pool over the
network only where a peer may need that; two pools exchange blocks only if their layouts are equal,
or known and convertible, which the reader does.
"""

import logging
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from typing import Final

from diptych.engine.core.handoff import TransferNews
from diptych.engine.core.messages import Address, Send
from diptych.engine.core.types import PoolId
from diptych.engine.pool import KV_TORCH_DTYPES
from diptych.engine.runner import LoadedModel
from diptych.kernels.cpp import CppKernels
from diptych.kernels.relayout import BlockLayout, Converter
from diptych.server.boot import HostBoot
from diptych.transfer.backend import Backend
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.nixl_backend import NixlBackend
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.porter import Porter
from diptych.transfer.relayout import STAGING_BLOCKS, RelayoutBackend
from diptych.transfer.shared_memory import SharedMemory, create_memory
from diptych.transfer.shm_backend import ShmBackend
from diptych.transfer.tcp_backend import TcpBackend
from diptych.transfer.tcp_server import BlockServer

_LOOPBACK: Final = "127.0.0.1"

_log = logging.getLogger("diptych")


def make_porter(
    boot: HostBoot,
    me: Address,
    home: PoolId,
    own: PoolMemory,
    model: LoadedModel,
    send: Callable[[Send], object],
    on_news: Callable[[TransferNews], None],
    on_wait: Callable[[], None],
) -> Porter:
    """For a worker of pool `home`. `on_wait` shows that it lives while it waits for others."""
    ways = _Ways(boot, home, own, model, on_wait)
    routes: dict[PoolId, Backend] = {}
    asked = boot.options.transfer != "auto"
    for pool in (found.pool for found in boot.layout.pools if found.pool != home):
        routes[pool] = ways.to(ways.layouts[pool])
        why = "asked for" if asked else "the pools are on one host"
        _log.info("pool %d -> pool %d: %s (%s)", pool, home, routes[pool].name, why)
    far = None
    if boot.network is not None:
        far = ways.over_network(ways.layouts[home], None)
        why = "asked for" if boot.options.transfer == far.name else "it is on another host"
        _log.info("pools of other hosts -> pool %d: %s (%s)", home, far.name, why)
    if ways.endpoint:
        _log.info("pool %d is served at %s", home, ways.endpoint)
    return Porter(me, own, routes, ways.endpoint, send, on_news, elsewhere=far)


def layout_digest(fingerprint: str, layout: BlockLayout) -> bytes:
    """Who reads a pool must know it by this: what the bytes mean, and how they lie."""
    return sha256(f"{fingerprint}\0{layout}".encode()).digest()


class _Ways:
    """The backends of one worker: one for each layout that a peer's pool may have."""

    def __init__(
        self,
        boot: HostBoot,
        home: PoolId,
        own: PoolMemory,
        model: LoadedModel,
        on_wait: Callable[[], None],
    ) -> None:
        config, host = model.config, boot.layout
        self.layouts = {
            pool.pool: BlockLayout(
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=host.block_size // pool.num_parts,
                num_parts=pool.num_parts,
                dtype=KV_TORCH_DTYPES[pool.dtype],
                panels=isinstance(model.kernels, CppKernels),
            )
            for pool in host.pools
        }
        self._boot = boot
        self._home = home
        self._own = own
        self._on_wait = on_wait
        self._fingerprint = model.fingerprint
        self._key = bytes.fromhex(boot.transfer_key)
        self._ip = _LOOPBACK if boot.network is None else boot.network.ip
        self.endpoint = ""  # where the own pool is served, if it is
        self.to = cache(self._to)
        self.over_network = cache(self._over_network)

    def _to(self, peer: BlockLayout) -> Backend:
        """For the pools of this host that have this layout."""
        mine = self.layouts[self._home]
        if peer == mine:
            return self._plain(peer, None)
        staging = _Staging(peer)
        converter = Converter(peer, staging.memory.data, mine, self._own.data)
        return RelayoutBackend(self._plain(peer, staging), converter)

    def _plain(self, peer: BlockLayout, staging: "_Staging | None") -> Backend:
        """Reads blocks as they are: into the own pool, or into `staging`."""
        if self._boot.options.transfer in ("tcp", "nixl"):
            return self.over_network(peer, staging)
        others = [pool for pool, layout in self.layouts.items() if layout == peer]
        peers = {pool: _map_peer(self._boot, pool) for pool in others if pool != self._home}
        return ShmBackend(self._own if staging is None else staging.memory, peers)

    def _over_network(self, peer: BlockLayout, staging: "_Staging | None") -> Backend:
        mine, theirs = self._digest(self.layouts[self._home]), self._digest(peer)
        if self._boot.options.transfer != "nixl":
            if not self.endpoint:
                self.endpoint = BlockServer(self._ip, self._own, self._key, mine).endpoint
            return TcpBackend(self._own if staging is None else staging.memory, self._key, theirs)
        fds = self._boot.layout.pool(self._home)
        into = None if staging is None else (staging.memory, staging.fd)
        backend = NixlBackend(
            self._own, fds.pool_fd, fds.page_fd, self._key, mine, self._ip, into, theirs
        )
        self.endpoint = self.endpoint or backend.endpoint
        if not backend.wait_up(on_wait=self._on_wait):
            _log.warning("NIXL does not start; prompts are computed where they decode")
        return backend

    def _digest(self, layout: BlockLayout) -> bytes:
        return layout_digest(self._fingerprint, layout)


class _Staging:
    """Memory for blocks of a peer's layout, which another process can map."""

    def __init__(self, layout: BlockLayout) -> None:
        num_bytes = STAGING_BLOCKS * layout.num_bytes
        self.fd = create_memory("staging", num_bytes)
        page = memoryview(bytearray(page_bytes(STAGING_BLOCKS, 0)))  # unused: nothing lives there
        data = SharedMemory(self.fd, num_bytes).view
        self.memory = PoolMemory(data, ControlPage(page, STAGING_BLOCKS, 0), layout.num_bytes)


def _map_peer(boot: HostBoot, pool: PoolId) -> PoolMemory:
    page = boot.layout.map_page(pool, writable=False)
    data = boot.layout.map_pool(pool, writable=False)
    return PoolMemory(data, page, boot.layout.pool(pool).block_bytes)
