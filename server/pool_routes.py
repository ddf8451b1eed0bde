"""Which way blocks take between the pools of a host, decided once per worker and pair of pools.

Owns the choice and its reason, which is logged. Invariant: a worker serves its pool over the
network only where a peer may need that.
"""

import logging
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from diptych.engine.core.handoff import TransferNews
from diptych.engine.core.messages import Address, Send
from diptych.engine.core.types import PoolId
from diptych.server.boot import HostBoot
from diptych.transfer.backend import Backend
from diptych.transfer.nixl_backend import NixlBackend
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.porter import Porter
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
    fingerprint: str,
    send: Callable[[Send], object],
    on_news: Callable[[TransferNews], None],
) -> Porter:
    """For a worker of pool `home`."""
    others = [pool.pool for pool in boot.layout.pools if pool.pool != home]
    network, transfer = boot.network, boot.options.transfer
    by_tcp, by_nixl = transfer == "tcp", transfer == "nixl"
    near: Backend
    far: Backend | None = None
    endpoint = ""
    if by_tcp or by_nixl or network is not None:
        key = bytes.fromhex(boot.transfer_key)
        layout = layout_digest(fingerprint, own.block_bytes)
        ip = _LOOPBACK if network is None else network.ip
        if by_nixl:
            fds = boot.layout.pool(home)
            far = NixlBackend(own, fds.pool_fd, fds.page_fd, key, layout, ip)
            endpoint = far.endpoint
            _log.info("pool %d is served at %s from process %d", home, endpoint, far.pid)
        else:
            endpoint = BlockServer(ip, own, key, layout).endpoint
            far = TcpBackend(own, key, layout)
            _log.info("pool %d is served at %s", home, endpoint)
    if far is not None and (by_tcp or by_nixl):
        near, reason = far, "asked for"
    else:
        near = ShmBackend(own, {pool: _map_peer(boot, pool) for pool in others})
        reason = "asked for" if transfer == "shm" else "the pools are on one host"
    for pool in others:
        _log.info("pool %d -> pool %d: %s (%s)", pool, home, near.name, reason)
    if far is not None and network is not None:
        why = "asked for" if far is near else "it is on another host"
        _log.info("pools of other hosts -> pool %d: %s (%s)", home, far.name, why)
    return Porter(me, own, dict.fromkeys(others, near), endpoint, send, on_news, elsewhere=far)


def layout_digest(fingerprint: str, block_bytes: int) -> bytes:
    """Two pools exchange blocks only if this is equal: what the bytes mean, and how many."""
    return sha256(f"{fingerprint}\0{block_bytes}".encode()).digest()


def _map_peer(boot: HostBoot, pool: PoolId) -> PoolMemory:
    page = boot.layout.map_page(pool, writable=False)
    data = boot.layout.map_pool(pool, writable=False)
    return PoolMemory(data, page, boot.layout.block_bytes)
